"""The structure of a torch.save pickle, read without running it.

torch.load(weights_only=True) executes nothing that a file names, but it does what the file says:
a tensor larger than its storage makes it allocate, an expanded one shows a billion images made
of four bytes. So the pickle's opcodes are interpreted here, on plain Python values, with tensors
as descriptions; whatever torch.save does not write for tensors, lists, numbers and text is refused.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
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
    *(f"torch {name}" for name in _STORAGES),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_MARK = object()


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


def read_structure(data: bytes, entries: Mapping[str, int]) -> Any:
    """What a `data.pkl` holds: a Tensor, a number, text, or lists and dicts of them.

    Args:
        data: the pickle.
        entries: bytes of each storage, by its key (the archive's `data/KEY`).

    Raises:
        LatentsError: another object, an opcode that torch.save does not write, a tensor whose
            extent is not within its storage, or a damaged pickle.
    """
    try:
        return _Machine(entries).run(data)
    except LatentsError:
        raise
    except Exception as error:  # pickletools and the stack raise many types on damaged input
        raise LatentsError("has a damaged pickle: its structure cannot be read") from error


class _Machine:
    """The pickle machine reduced to what torch.save (protocol 2) writes for latents files."""

    def __init__(self, entries: Mapping[str, int]) -> None:
        self._entries = entries
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        argument: Any
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _VALUES:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in ("BINPUT", "LONG_BINPUT"):
                self._memo[argument] = self._stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif name == "GLOBAL":
                self._stack.append(self._global(argument))
            elif name != "PROTO":
                action = getattr(self, f"_op_{name.lower()}", None)
                if action is None:
                    raise LatentsError(
                        f"is not what torch.save writes for tensors (pickle opcode {name}): "
                        "refused, nothing of it was executed"
                    )
                action()
        raise LatentsError("has a damaged pickle: it does not end")

    def _global(self, name: str) -> _Global:
        if name not in _GLOBALS:
            shown = name.replace(" ", ".")[:80]
            raise LatentsError(
                f"holds a pickled object ({shown}): only tensors, lists, numbers and text are "
                "read; refused, nothing of it was executed"
            )
        return _Global(name)

    def _since_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _op_mark(self) -> None:
        self._stack.append(_MARK)

    def _op_empty_list(self) -> None:
        self._stack.append([])

    def _op_empty_dict(self) -> None:
        self._stack.append({})

    def _op_empty_tuple(self) -> None:
        self._stack.append(())

    def _op_append(self) -> None:
        self._extend([self._stack.pop()])

    def _op_appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise LatentsError("has a damaged pickle: it appends to what is no list")
        target += items

    def _op_setitem(self) -> None:
        self._update([self._stack.pop(-2), self._stack.pop()])

    def _op_setitems(self) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        # Hashing a tuple that holds itself twice over, thirty levels deep, takes for ever.
        if not all(isinstance(key, (str, int)) for key in items[::2]):
            raise LatentsError("holds a dict whose keys are not names: refused")
        target = self._stack[-1]
        if type(target) is not dict:
            raise LatentsError("has a damaged pickle: it sets keys of what is no dict")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _op_tuple(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _op_tuple1(self) -> None:
        self._stack[-1:] = [tuple(self._stack[-1:])]

    def _op_tuple2(self) -> None:
        self._stack[-2:] = [tuple(self._stack[-2:])]

    def _op_tuple3(self) -> None:
        self._stack[-3:] = [tuple(self._stack[-3:])]

    def _op_build(self) -> None:
        # OrderedDict's attributes; no tensor of a latents file has any.
        state = self._stack.pop()
        if type(self._stack[-1]) is not dict or type(state) is not dict:
            raise LatentsError("holds an object with a state: refused, nothing of it was executed")

    def _op_binpersid(self) -> None:
        kind, storage, key, _, count = self._stack.pop()
        dtype = _STORAGES.get(storage.name.removeprefix("torch "))
        if kind != "storage" or dtype is None or not isinstance(count, int) or count < 0:
            raise LatentsError("has a damaged pickle: a storage that is none")
        needed, held = count * dtype.itemsize, self._entries.get(key, -1)
        if needed > held:
            raise LatentsError(
                f"is truncated or hostile: a tensor needs {needed} bytes, the archive holds "
                f"{max(0, held)}"
            )
        self._stack.append(_Storage(key, dtype, count))

    def _op_reduce(self) -> None:
        arguments = self._stack.pop()
        function = self._stack.pop().name
        if function == "torch._utils _rebuild_tensor_v2":
            # The fifth and sixth are of gradients; a seventh would negate the numbers.
            if any(arguments[6:]):
                raise LatentsError("holds a tensor with flags: save tensor.contiguous() instead")
            self._stack.append(_tensor(*arguments[:4]))
        elif function == "torch._utils _rebuild_parameter":
            if not isinstance(arguments[0], Tensor):
                raise LatentsError("has a damaged pickle: a parameter that is no tensor")
            self._stack.append(arguments[0])
        elif function == "collections OrderedDict" and arguments == ():
            self._stack.append({})
        elif function == "torch Size" and len(arguments) == 1 and type(arguments[0]) is tuple:
            self._stack.append(arguments[0])
        else:
            raise LatentsError(f"has a damaged pickle: {function.replace(' ', '.')} misused")


def _tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    numbers = (offset, *shape, *stride)
    whole = all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers)
    if not isinstance(storage, _Storage) or not whole or not len(shape) == len(stride) <= MAX_AXES:
        raise LatentsError("has a damaged pickle: a tensor that is none")
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
