"""The structure of a torch.save pickle, read without running it.

torch.load(weights_only=True) executes nothing that a file names, but it does what the file says:
a tensor larger than its storage makes it allocate, an expanded one shows a billion images made
of four bytes. So the pickle's opcodes are interpreted here, on plain Python values, with tensors
as descriptions; whatever torch.save does not write for tensors, lists, numbers and text is refused.
"""

from __future__ import annotations

import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Any

import numpy as np

from latentguard.errors import LatentsError
from latentguard.files.bounds import MAX_AXES
from latentguard.spaces.arrays import BFLOAT16

# The storages that a latents file may hold, latents or not.
_STORAGES = {
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "ByteStorage": np.dtype("u1"),
    "CharStorage": np.dtype("i1"),
    "ShortStorage": np.dtype("<i2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "BoolStorage": np.dtype("?"),
}
_GLOBALS = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "torch Size",
    "torch device",
    *(f"torch {name}" for name in _STORAGES),
}
# Types that a dict may name beside its latents; they are values, nothing is made of them.
_DTYPES = {
    f"torch {name}"
    for name in (
        "float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64",
        "bool",
    )
}  # fmt: skip
_STOP = ord(".")
_BYTE, _SHORT, _WORD = Struct("<B"), Struct("<H"), Struct("<I")
_SIGNED, _DOUBLE = Struct("<i"), Struct(">d")


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class Tensor:
    """A tensor that the file describes, with its extent checked against its storage.

    key: of the storage. offset, strides: in elements.
    """

    key: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_structure(data: bytes, entries: Mapping[str, int]) -> tuple[Any, list[str]]:
    """What a `data.pkl` holds: a Tensor, a number, text, or lists and dicts of them; and the keys
    of its storages, in the order in which it first mentions them.

    Args:
        data: the pickle.
        entries: bytes of each storage, by its key (the archive's `data/KEY`).

    Raises:
        LatentsError: another object, an opcode that torch.save does not write, a tensor whose
            extent is not within its storage, or a damaged pickle.
    """
    try:
        machine = _Machine(data, entries)
        return machine.run(), list(machine.storages)
    except LatentsError:
        raise
    except Exception as error:  # the stack raises many types on damaged input
        raise LatentsError("has a damaged pickle: its structure cannot be read") from error


class _Machine:
    """The pickle machine reduced to what torch.save (protocol 2) writes for latents files.

    Its stack is that of torch's own unpickler: a mark hides what is below it, so that no opcode
    reaches there.
    """

    def __init__(self, data: bytes, entries: Mapping[str, int]) -> None:
        self._data = data
        self._at = 0
        self._entries = entries
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self) -> Any:
        # The opcodes decide what is read, whatever protocol is announced.
        if self._take(2)[:1] != b"\x80":
            raise LatentsError("has a damaged pickle: it does not say its protocol")
        while (code := self._take(1)[0]) != _STOP:
            action = _ACTIONS.get(code)
            if action is None:
                raise _not_written(code)
            action(self)
        if self._at != len(self._data) or len(self._stack) != 1 or self._below:
            raise LatentsError("has a damaged pickle: it holds more than one value")
        return self._stack.pop()

    def _take(self, count: int) -> bytes:
        """The next bytes, all of them, or LatentsError."""
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise LatentsError("has a damaged pickle: it does not end")
        self._at += count
        return taken

    def _number(self, form: Struct) -> Any:
        return form.unpack(self._take(form.size))[0]

    def _constant(self, value: bool | None) -> None:
        self._stack.append(value)

    def _fixed(self, form: Struct) -> None:
        self._stack.append(self._number(form))

    def _put(self, form: Struct) -> None:
        self._memo[self._number(form)] = self._stack[-1]

    def _get(self, form: Struct) -> None:
        self._stack.append(self._memo[self._number(form)])

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def _text(self) -> None:
        self._stack.append(str(self._take(self._number(_WORD)), "utf-8", "surrogatepass"))

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at)
        line = self._data[self._at : end]
        self._at = end + 1
        return line.decode("utf-8")

    def _global(self) -> None:
        name = f"{self._line()} {self._line()}"
        if name not in _GLOBALS and name not in _DTYPES:
            shown = name.replace(" ", ".")[:80]
            raise LatentsError(
                f"holds a pickled object ({shown}): only tensors, lists, numbers and text are "
                "read; refused, nothing of it was executed; save it without that"
            )
        self._stack.append(_Global(name))

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _empty_list(self) -> None:
        self._stack.append([])

    def _empty_dict(self) -> None:
        self._stack.append({})

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise LatentsError("has a damaged pickle: it appends to something that is not a list")
        target += items

    def _setitem(self) -> None:
        self._update([self._stack.pop(-2), self._stack.pop()])

    def _setitems(self) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        # Hashing a tuple that holds itself twice over, thirty levels deep, takes for ever.
        if not all(isinstance(key, (str, int)) for key in items[::2]):
            raise LatentsError(
                "holds a dict whose keys are not names: save it with text as its keys"
            )
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise LatentsError("has a damaged pickle: it sets keys of something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The later one counts in a Python dict, but torch.save never writes two.
            if key in target:
                raise LatentsError(f"has a damaged pickle: a dict holds {str(key)[:60]!r} twice")
            target[key] = value

    def _tuple(self) -> None:
        items = tuple(self._since_mark())
        self._stack.append(items)

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise LatentsError("has a damaged pickle: a tuple of what is not there")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _build(self) -> None:
        # OrderedDict's attributes; no tensor of a latents file has any.
        state = self._stack.pop()
        if type(self._stack[-1]) is not OrderedDict or type(state) is not dict:
            raise LatentsError("holds an object with a state: refused, nothing of it was executed")

    def _storage(self) -> None:
        """A storage; every mention of one must agree with the first.

        torch takes dtype and length from the first mention of a key and ignores the others.
        """
        saved = self._stack.pop()
        if type(saved) is not tuple or len(saved) != 5 or type(saved[1]) is not _Global:
            raise LatentsError("has a damaged pickle: an invalid storage")
        kind, storage, key, location, count = saved
        dtype = _STORAGES.get(storage.name.removeprefix("torch "))
        texts = type(key) is str and type(location) is str
        if kind != "storage" or dtype is None or not texts or type(count) is not int or count < 0:
            raise LatentsError("has a damaged pickle: an invalid storage")
        if location == "meta":
            raise LatentsError("holds a tensor of the meta device, which has no numbers")
        needed, held = count * dtype.itemsize, self._entries.get(key, -1)
        if needed > held:
            raise LatentsError(
                f"is truncated or hostile: a tensor needs {needed} bytes, the archive holds "
                f"{max(0, held)}"
            )
        if held != needed:
            raise LatentsError(
                f"is damaged or hostile: storage {key[:60]!r} is said to have {needed} bytes, the "
                f"archive holds {held}"
            )
        found = _Storage(key, dtype, count)
        if self.storages.setdefault(key, found) != found:
            raise LatentsError(
                f"is hostile: storage {key[:60]!r} is mentioned with two types or lengths, and "
                "readers differ on which one counts"
            )
        self._stack.append(found)

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        function = self._stack.pop()
        if type(function) is not _Global or type(arguments) is not tuple:
            raise LatentsError("has a damaged pickle: it calls something that cannot be called")
        name = function.name
        if name == "torch._utils _rebuild_tensor_v2" and len(arguments) in (6, 7):
            # A seventh would negate or conjugate the numbers.
            if any(arguments[6:]):
                raise LatentsError("holds a tensor with flags: save tensor.contiguous() instead")
            tensor = _tensor(*arguments[:4])
            _check_gradients(tensor, *arguments[4:6])
            self._stack.append(tensor)
        elif name == "torch._utils _rebuild_parameter" and len(arguments) == 3:
            if not isinstance(arguments[0], Tensor):
                raise LatentsError("has a damaged pickle: a parameter that is not a tensor")
            _check_gradients(*arguments)
            self._stack.append(arguments[0])
        elif name == "collections OrderedDict" and arguments == ():
            self._stack.append(OrderedDict())
        elif name == "torch device" and arguments and type(arguments[0]) is str:
            self._stack.append(_Global(name))
        elif name == "torch Size" and len(arguments) == 1 and _sizes(arguments[0]):
            self._stack.append(arguments[0])
        else:
            raise LatentsError(f"has a damaged pickle: {name.replace(' ', '.')} misused")


_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    ord("N"): lambda machine: machine._constant(None),
    0x88: lambda machine: machine._constant(True),
    0x89: lambda machine: machine._constant(False),
    ord("J"): lambda machine: machine._fixed(_SIGNED),
    ord("K"): lambda machine: machine._fixed(_BYTE),
    ord("M"): lambda machine: machine._fixed(_SHORT),
    ord("G"): lambda machine: machine._fixed(_DOUBLE),
    0x8A: _Machine._long,
    ord("X"): _Machine._text,
    ord("q"): lambda machine: machine._put(_BYTE),
    ord("r"): lambda machine: machine._put(_WORD),
    ord("h"): lambda machine: machine._get(_BYTE),
    ord("j"): lambda machine: machine._get(_WORD),
    ord("c"): _Machine._global,
    ord("("): _Machine._mark,
    ord("]"): _Machine._empty_list,
    ord("}"): _Machine._empty_dict,
    ord(")"): _Machine._empty_tuple,
    ord("a"): _Machine._append,
    ord("e"): _Machine._appends,
    ord("s"): _Machine._setitem,
    ord("u"): _Machine._setitems,
    ord("t"): _Machine._tuple,
    0x85: lambda machine: machine._tuple_of(1),
    0x86: lambda machine: machine._tuple_of(2),
    0x87: lambda machine: machine._tuple_of(3),
    ord("b"): _Machine._build,
    ord("Q"): _Machine._storage,
    ord("R"): _Machine._reduce,
}


def _not_written(code: int) -> LatentsError:
    name = next((op.name for op in pickletools.opcodes if op.code == chr(code)), hex(code))
    advice = "; save it with torch.save's own pickle_protocol" if name == "FRAME" else ""
    return LatentsError(
        f"is not what torch.save writes for tensors (pickle opcode {name}): refused, nothing of it "
        f"was executed{advice}"
    )


def _check_gradients(tensor: Tensor, requires_grad: Any, hooks: Any) -> None:
    # As torch has it, whole numbers have no gradients. BFLOAT16 is of kind V.
    possible = tensor.dtype.kind in "fV" or requires_grad is False
    if type(requires_grad) is not bool or not possible or type(hooks) is not OrderedDict or hooks:
        raise LatentsError("holds a tensor with hooks of its own: save tensor.detach() instead")


def _sizes(value: Any) -> bool:
    return type(value) is tuple and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    whole = _sizes((offset,)) and _sizes(shape) and _sizes(stride)
    if type(storage) is not _Storage or not whole or not len(shape) == len(stride) <= MAX_AXES:
        raise LatentsError("has a damaged pickle: an invalid tensor")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if count and last >= storage.count:
        raise LatentsError(
            f"holds a tensor of shape {list(shape)} that reaches beyond its {storage.count} numbers"
        )
    if count > storage.count:
        raise LatentsError(
            f"holds an expanded tensor: shape {list(shape)} over {storage.count} stored numbers; "
            "save tensor.contiguous() instead"
        )
    return Tensor(storage.key, storage.dtype, offset, shape, stride)
