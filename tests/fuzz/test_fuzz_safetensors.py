"""Structures of .safetensors: what is read here is what the official library hands out."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from fuzz_helpers import chosen, compared

from latentguard.files.claims import KEYS, Claims
from latentguard.files.safetensors_files import open_safetensors

safetensors = pytest.importorskip("safetensors", reason="compares with the official library")

SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "BOOL": 1, "U8": 1, "F8_E4M3": 1}
FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def structures(seed: int, count: int) -> Counter[str]:
    """Build and compare `count` files; keys: tried, read, refused, disagreed."""
    counts: Counter[str] = Counter()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"

        def library(data: bytes) -> tuple[Any, dict[str, Any]]:
            tensors = dict(safetensors.deserialize(data))
            path.write_bytes(data)
            with safetensors.safe_open(path, "np") as opened:
                metadata = opened.metadata() or {}
                assert set(opened.keys()) == set(tensors)
            names = chosen(
                {
                    n: (tuple(t["shape"]), t["dtype"] in {*FLOATS, "BF16"})
                    for n, t in tensors.items()
                }
            )
            says = Claims.parse(metadata, text=True)
            return [_array(tensors[name]) for name in names], {
                key: getattr(says, key) for key in KEYS if getattr(says, key) is not None
            }

        for index in range(seed, seed + count):
            data = built(random.Random(index))
            compared(counts, f"safetensors {index}", data, open_safetensors, library)
    return counts


def _array(entry: dict[str, Any]) -> Any:
    raw, shape = bytes(entry["data"]), entry["shape"]
    if entry["dtype"] == "BF16":
        bits = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(raw, FLOATS[entry["dtype"]]).reshape(shape)


def built(chance: random.Random) -> bytes:
    """A file written field by field, mostly as the library does, and here and there not."""

    def rare(probability: float = 0.03) -> bool:
        return chance.random() < probability

    names = ["latents"] if not rare(0.1) else ["samples"]
    names += chance.sample(["a", "thumbnail", "\u00e9"], chance.randrange(3))
    chance.shuffle(names)
    items, position = [], 0
    for name in names:
        dtype = chance.choice(list(SIZES) if name == "thumbnail" else ["F16", "BF16", "F32", "F64"])
        shape = chance.choice([[4, 2, 2], [1, 4, 2, 2], [2, 4, 2, 2]])
        if name != "latents" and rare(0.3):
            shape = chance.choice([[], [0], [3], [2, 0], [5, 1]])
        size = SIZES[dtype] * int(np.prod(shape))
        begin = position
        if rare():
            begin += chance.choice([-1, 1, 8, -8, -position])
        position = begin + size
        end = position + (chance.choice([-1, 1]) if rare(0.02) else 0)
        items.append((name, _entry(chance, dtype, shape, begin, end)))
    if rare(0.05):
        items.append(chance.choice(items))
    if rare():
        items.append((chance.choice(["latents", "x", "\\ud800"]), "null"))
    chance.shuffle(items)
    if chance.random() < 0.5:
        items.insert(chance.randrange(len(items) + 1), ("__metadata__", _metadata(chance)))
    if rare(0.01):
        items.append(("__metadata__", _metadata(chance)))
    colon, comma = chance.choice([(":", ","), (": ", ", "), (" :\n", " ,\t")])
    text = "{" + comma.join(f'"{name}"{colon}{value}' for name, value in items) + "}"
    if rare():
        text = chance.choice(
            [" " + text, "\ufeff" + text, text[:-1] + ",}", text + "x", f"[{text}]"]
        )
    raw = text.encode(
        "utf-8" if not rare(0.01) else chance.choice(["utf-16", "utf-32", "latin-1"]), "replace"
    )
    raw += chance.choice([b" ", b"\n", b"\0", b"\t"]) * chance.choice([0, 0, 1, 7, -len(raw) % 8])
    length = len(raw) + (chance.choice([-1, 1, 8, 2**40]) if rare(0.02) else 0)
    held = max(0, position + (chance.choice([-1, 1, 8, 64]) if rare() else 0))
    numbers = np.random.default_rng(chance.randrange(99)).bytes(held)
    return struct.pack("<Q", length) + raw + numbers


def _entry(chance: random.Random, dtype: str, shape: list[int], begin: int, end: int) -> str:
    def number(value: int) -> str:
        if chance.random() < 0.006:
            odd = ["1e400", "NaN", "null", "-0", str(2**64 + value)]
            return chance.choice([*odd, f"{value}.0", f"-{value}", f"{value}e0", f"0{value}"])
        return str(value)

    fields = [
        ("dtype", f'"{dtype}"'),
        ("shape", f"[{','.join(number(n) for n in shape)}]"),
        ("data_offsets", f"[{number(begin)},{number(end)}]"),
    ]
    if chance.random() < 0.3:
        chance.shuffle(fields)
    if chance.random() < 0.02:
        fields.append(chance.choice([*fields, ("more", "1"), ("shape", "[4,2,2]")]))
    if chance.random() < 0.02:
        fields[0] = chance.choice([("dtype", '"f32"'), ("dtype", '"Q4"'), ("dtype", '"\\u004632"')])
    if chance.random() < 0.01:
        fields.pop()
    return "{" + ",".join(f'"{key}":{value}' for key, value in fields) + "}"


def _metadata(chance: random.Random) -> str:
    values: dict[str, Any] = {
        "space": "sdxl", "scaled": "true", "ids": '["a","b"]', "scale": "0.5", "note": "\u2603",
    }  # fmt: skip
    kept = {key: values[key] for key in chance.sample(list(values), chance.randrange(4))}
    if chance.random() < 0.03:
        kept["more"] = chance.choice([1, None, ["a"], {"b": "c"}])
    text = json.dumps(kept)
    if chance.random() < 0.04:
        return chance.choice(
            ["null", "{}", "[]", '{"space":"sdxl","space":"sd1"}', '{"a":"\\ud800"}']
        )
    return text


def test_the_official_library_hands_out_what_was_read() -> None:
    counts = structures(0, 500)
    assert counts["disagreed"] == 0
    assert counts["read"] > 100
    assert counts["refused"] > 100
