"""Structures of .pt: what is read here is what torch.load(weights_only=True) hands out."""

from __future__ import annotations

import io
import random
import struct
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch
from fuzz_archives import FAULTS, Archive, Part, prefixed, two_directories
from fuzz_helpers import compared

from latentguard.files.torch_files import open_torch

KINDS = ["Half", "BFloat16", "Float", "Double", "Long", "Byte"]
SIZES = {"Half": 2, "BFloat16": 2, "Float": 4, "Double": 8, "Long": 8, "Byte": 1}


def structures(seed: int, count: int) -> Counter[str]:
    """Build and compare `count` files; keys: tried, read, refused, disagreed."""
    counts: Counter[str] = Counter()
    for index in range(count):
        label = f"torch {seed + index}"
        compared(counts, label, built(random.Random(seed + index)), open_torch, library)
    return counts


def library(data: bytes) -> tuple[Any, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    says: dict[str, Any] = {}
    if isinstance(value, dict):
        says = {key: item for key, item in value.items() if isinstance(key, str)}
        tensors = [item for item in value.values() if isinstance(item, torch.Tensor)]
        value = value["latents"] if "latents" in value else tensors[0]
    if isinstance(value, (list, tuple)):
        return [_array(item) for item in value], says
    return _array(value), says


def _array(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def built(chance: random.Random) -> bytes:
    archive = _archive(chance)
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        chance.choice(FAULTS)(chance, archive)
    kind = chance.random()
    if kind < 0.03:
        return two_directories(archive, _archive(chance))
    if kind < 0.05:
        return prefixed(archive.build(), chance.choice([b"\0", b"PK\x03\x04" + b"\0" * 60]))
    return archive.build()


def _archive(chance: random.Random) -> Archive:
    pickle = _Pickle(chance)
    data = pickle.file()
    records = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    for key, (kind, numbers) in pickle.storages.items():
        held = numbers * SIZES[kind]
        if chance.random() < 0.06:
            held = max(0, held + chance.randint(-9, 9))
        values = np.random.default_rng(chance.randrange(99)).standard_normal(held // 2 + 1)
        records[f"data/{key}"] = values.astype("<f2").tobytes()[:held]
    optional: dict[str, list[bytes]] = {
        ".format_version": [b"1", b"2"],
        ".storage_alignment": [b"64", b"0x40", b"1"],
        "version": [b"3", b"10", b"0\n", b"99\n", b" 3\n", b"3x"],
        "byteorder": [b"big", b"BIG", b"little\n", b""],
        ".data/serialization_id": [b"1" * 40],
        "constants.pkl": [b"\x80\x02N."],
        "extra/a": [b"x"],
    }
    if chance.random() < 0.3:
        key = chance.choice(list(optional))
        records[key] = chance.choice(optional[key])
    if chance.random() < 0.05:
        records.pop(chance.choice(list(records)))
    folders = ["archive", "a.b", "\u00e9"]
    folder = chance.choice(folders)
    parts = []
    for name, content in records.items():
        top = chance.choice(folders) if chance.random() < 0.01 else folder
        part = Part(f"{top}/{name}".encode(), content)
        if folder == "\u00e9":
            part.local["flags"] = part.central["flags"] = 0x800
        parts.append(part)
    return Archive(parts, zip64=chance.random() < 0.5)


class _Pickle:
    """A structure written opcode by opcode, mostly as torch.save does, and here and there not."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._memo = 0
        self.storages: dict[str, tuple[str, int]] = {}

    def _rare(self, probability: float = 0.02) -> bool:
        return self._chance.random() < probability

    def file(self) -> bytes:
        chance = self._chance
        kind = chance.choice(["tensor", "list", "dict", "dict", "list of views"])
        if kind == "tensor":
            body = self._tensor()
        elif kind == "list":
            body = self._put(b"](" + b"".join(self._tensor() for _ in range(2)) + b"e")
        elif kind == "list of views":
            body = b"](" + b"".join(self._tensor(key="0") for _ in range(3)) + b"e"
        else:
            body = self._dict()
        end = b"." if not self._rare() else chance.choice([b"", b"..", b"0.", b".N."])
        start = b"\x80\x02" if not self._rare() else chance.choice([b"", b"\x80\x03", b"\x80\x04"])
        junk = chance.choice([b"N", b"(", b"K\x01", b"h\x00", b"h\x07", b"N0", b"2", b"\x94"])
        return start + (junk if self._rare() else b"") + body + end

    def _dict(self) -> bytes:
        chance = self._chance
        ordered = b"ccollections\nOrderedDict\n)R"
        items = [
            (self._text("latents"), self._tensor()),
            (self._text("space"), self._text("sdxl")),
            (self._text("scaled"), chance.choice([b"\x88", b"\x89"])),
        ]
        more = [
            (self._text("thumbnail"), self._tensor(key="0")),
            (self._text("latents"), self._tensor()),
            (self._text("ids"), b"](" + self._text("a") + b"K\x07e"),
            (b"K\x01", b"N"),
            (b"\x88", b"N"),
            (self._text("dtype"), b"ctorch\nbfloat16\n"),
            (self._text("device"), b"ctorch\ndevice\n" + self._text("cpu") + b"\x85R"),
            (self._text("size"), b"ctorch\nSize\n(K\x01K\x02t\x85R"),
            (self._text("width"), b"M\x40\x00"),
            (self._text("scale"), b"G" + struct.pack(">d", 0.5)),
            (self._text("x\ud800"), self._text("\ud800")),
        ]
        for _ in range(chance.randrange(3)):
            items.insert(chance.randrange(len(items) + 1), chance.choice(more))
        body = ordered if chance.random() < 0.3 else b"}"
        body = self._put(body)
        if chance.random() < 0.2:
            body += b"".join(key + value + b"s" for key, value in items)
        else:
            body += b"(" + b"".join(key + value for key, value in items) + b"u"
        if self._rare(0.05):
            body += b"}(" + self._text("_metadata") + b"Nub"
        return body

    def _put(self, body: bytes) -> bytes:
        """Remembered in the memo, now and then as what it is not (the last value on the stack)."""
        if self._chance.random() < 0.5:
            return body
        self._memo += 1
        if self._rare():
            return body + b"q\x01h\x010" + b""
        return body + b"q" + bytes([self._memo])

    def _text(self, value: str) -> bytes:
        raw = value.encode("utf-8", "surrogatepass")
        if self._rare(0.005):
            return b"U" + bytes([len(raw)]) + raw
        return b"X" + struct.pack("<I", len(raw)) + raw

    def _number(self, value: int) -> bytes:
        if self._rare(0.01):
            return self._chance.choice([b"N", b"\x88", b"\x89", b"G" + b"\0" * 8, self._text("1")])
        if not 0 <= value < 2**31:
            raw = value.to_bytes(9, "little", signed=True)
            return b"\x8a\x09" + raw
        forms = [b"J" + struct.pack("<i", value)]
        if value < 256:
            forms.append(b"K" + bytes([value]))
        if value < 65536:
            forms.append(b"M" + struct.pack("<H", value))
        return self._chance.choice(forms)

    def _tuple(self, values: list[int]) -> bytes:
        body = b"".join(self._number(value) for value in values)
        if self._rare(0.01):
            return b"](" + body + b"e"
        if 1 <= len(values) <= 3 and self._chance.random() < 0.5:
            return body + bytes([0x84 + len(values)])
        return b"(" + body + b"t"

    def _storage(self, key: str, kind: str, numbers: int) -> bytes:
        chance = self._chance
        first, held = self.storages.setdefault(key, (kind, numbers))
        if not self._rare(0.05):
            kind = first
        if not self._rare(0.05):
            numbers = held
        if self._rare(0.02):
            numbers += chance.choice([-1, 1, 1000, -numbers])
        location = "cpu" if not self._rare() else chance.choice(["meta", "cuda:0", "CPU", ""])
        name = f"ctorch\n{kind}Storage\n".encode()
        fields = [self._text("storage"), name, self._text(key), self._text(location)]
        if self._rare(0.01):
            fields[2] = b"K\x00"
        if self._rare(0.01):
            fields.append(b"N")
        return b"(" + b"".join(fields) + self._number(numbers) + b"tQ"

    def _tensor(self, key: str | None = None) -> bytes:
        chance = self._chance
        shape = chance.choice([[4, 2, 2], [1, 4, 2, 2], [2, 4, 2, 2], [3, 4, 2, 3]])
        strides = [1]
        for axis in reversed(shape[1:]):
            strides.insert(0, strides[0] * axis)
        order = list(range(len(shape)))
        if chance.random() < 0.3:
            chance.shuffle(order)
            strides = [strides[axis] for axis in order]
            shape = [shape[axis] for axis in order]
        if self._rare(0.1):
            strides[chance.randrange(len(strides))] = chance.choice([0, 1, 2, 3, 16, -1])
        if self._rare(0.05):
            shape[chance.randrange(len(shape))] = chance.choice([0, 1, 4, -1, 2**40])
        offset = chance.choice([0, 0, 0, 1, 16])
        kind = chance.choice(KINDS[:4]) if not self._rare(0.05) else chance.choice(KINDS)
        count = max(1, int(np.prod([n for n in shape if 0 < n < 9])))
        key = str(len(self.storages)) if key is None else key
        storage = self._storage(key, kind, count + offset + chance.choice([0, 0, 16]))
        flags = chance.choice([b"\x89", b"\x89", b"\x88"]) if not self._rare() else b"K\x01"
        hooks = b"ccollections\nOrderedDict\n)R"
        if self._rare():
            hooks = chance.choice([b"N", b"}", b"}K\x01Ns", hooks + b"K\x01Ns"])
        rest = b""
        if self._rare(0.05):
            rest = chance.choice([b"N", b"}", b"}" + self._text("neg") + b"\x88s", b"NN", b"K\x01"])
        sizes = self._tuple(shape)
        if self._rare(0.1):
            sizes = b"ctorch\nSize\n" + sizes + b"\x85R"
        body = (
            b"ctorch._utils\n_rebuild_tensor_v2\n("
            + storage + self._number(offset) + sizes + self._tuple(strides) + flags + hooks + rest
            + b"tR"
        )  # fmt: skip
        if self._rare(0.1):
            body = b"ctorch._utils\n_rebuild_parameter\n(" + body + flags + hooks + b"tR"
        return self._put(body)


def test_torch_load_hands_out_what_was_read() -> None:
    counts = structures(0, 1500)
    assert counts["disagreed"] == 0
    assert counts["read"] > 200
    assert counts["refused"] > 200
