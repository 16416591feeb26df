"""Structures of MDS shards: what is read here is what StreamingDataset's reader hands out."""

from __future__ import annotations

import io
import json
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_helpers import compared_rows

from latentguard.errors import LatentsError
from latentguard.files.claims import Claims
from latentguard.files.mds import read_mds
from latentguard.files.options import Reading
from latentguard.files.passed_over import PassedOver

TYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32",
    34: "float32", 64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
NOWHERE = Path("/nonexistent/a.mds")


def structures(seed: int, count: int) -> Counter[str]:
    """Build and compare `count` shards; keys: tried, read, refused, disagreed."""
    counts: Counter[str] = Counter()
    for index in range(seed, seed + count):
        compared_rows(counts, f"mds {index}", built(random.Random(index)), _ours, library)
    return counts


def _ours(data: bytes) -> Any:
    """The array of each sample; None for one with an error."""
    for row in read_mds(io.BytesIO(data), len(data), NOWHERE, Reading(), PassedOver()):
        if isinstance(row, LatentsError):
            yield None
            continue
        try:
            images = list(row.open(Claims(space="sd1")).images())
        except LatentsError:
            yield None
            continue
        yield None if len(images) != 1 or isinstance(images[0], LatentsError) else images[0]


def library(data: bytes) -> list[Any]:
    """As MDSReader of mosaicml-streaming reads samples, and NDArray decodes; None for what it
    raises. The columns are those of the shard, which its writer repeats in index.json."""
    (samples,) = struct.unpack("<I", data[:4])
    table = 4 + 4 * (samples + 1)
    (first,) = struct.unpack("<I", data[4:8])
    config = json.loads(data[table:first])
    names, encodings = config["column_names"], config["column_encodings"]
    found: list[Any] = []
    for index in range(samples):
        begin, end = np.frombuffer(data[4 + 4 * index : 12 + 4 * index], np.uint32)
        try:
            found.append(_sample(data[begin:end], names, encodings, config["column_sizes"]))
        except Exception:  # whatever the library raises, it hands out no sample
            found.append(None)
    return found


def _sample(data: bytes, names: list[str], encodings: list[str], fixed: list[Any]) -> Any:
    sizes, at = [], 0
    for size in fixed:
        if not size:
            (size,) = np.frombuffer(data[at : at + 4], np.uint32)
            at += 4
        sizes.append(size)
    values = {}
    for name, encoding, size in zip(names, encodings, sizes, strict=True):
        values[name] = encoding, data[at : at + int(size)]
        at += int(size)
    encoding, value = values["latents"]
    kind, _, config = encoding.partition(":")
    dtype, colon, shape = config.partition(":")
    assert kind == "ndarray"
    assert dtype in TYPES.values() or not config
    assert shape or not colon
    at = 0
    if not dtype:
        dtype, at = TYPES[value[0]], 1
    if shape:
        axes: Any = tuple(map(int, shape.split(",")))
    else:
        kind = f"uint{8 * 2 ** (value[at] % 4)}"
        size = (value[at] >> 2) * 2 ** (value[at] % 4)
        axes = np.frombuffer(value[at + 1 : at + 1 + size], kind)
        at += 1 + size
    return np.frombuffer(value[at:], dtype).reshape(axes)


def built(chance: random.Random) -> bytes:
    """A shard written field by field, mostly as MDSWriter does, and here and there not."""

    def rare(probability: float = 0.04) -> bool:
        return chance.random() < probability

    encoding = chance.choice(["ndarray", "ndarray:float32", "ndarray:float16:4,2,2", "ndarray"])
    if rare():
        encoding = chance.choice(
            ["ndarray:float32:4,2,-2", "ndarray:float32:4,+2,2", "ndarray:f4", "ndarray:float32:",
             "ndarray::4,2,2", "ndarray:float32:4,2,2:", "ndarray:float64:16"]
        )  # fmt: skip
    size = 32 if encoding.endswith("4,2,2") and "16" in encoding else None
    if rare():
        size = chance.choice([None, 0, 31, 64])
    columns: list[tuple[str, str, int | None]] = [("key", "str", None), ("n", "int", 8)]
    columns = chance.sample(columns, chance.randrange(3))
    columns.insert(chance.randrange(len(columns) + 1), ("latents", encoding, size))
    samples = []
    for _ in range(chance.randint(1, 4)):
        values = {"key": b"k" * chance.randrange(3), "n": bytes(8)}
        values["latents"] = _array(chance, encoding, rare)
        head = b""
        for name, _, fixed in columns:
            if fixed is None:
                length = len(values[name]) + (chance.choice([-1, 1, 999]) if rare(0.02) else 0)
                head += struct.pack("<I", max(0, length))
        samples.append(head + b"".join(values[name] for name, _, _ in columns))
    config = {
        "column_names": [name for name, _, _ in columns],
        "column_encodings": [kind for _, kind, _ in columns],
        "column_sizes": [fixed for _, _, fixed in columns],
        "format": "mds", "version": 2, "compression": None, "hashes": [], "size_limit": 1 << 26,
    }  # fmt: skip
    if rare():
        config[chance.choice(list(config))] = chance.choice([None, 1, [], "mds", ["latents"]])
    text = json.dumps(config, sort_keys=True).encode()
    start = 4 + 4 * (len(samples) + 1) + len(text)
    offsets = [start]
    for sample in samples:
        offsets.append(offsets[-1] + len(sample))
    if rare():
        place = chance.randrange(len(offsets))
        offsets[place] = max(0, offsets[place] + chance.choice([-8, -1, 1, 8, 10**6]))
    count = len(samples) + (chance.choice([-1, 1]) if rare(0.02) else 0)
    data = struct.pack(f"<I{len(offsets)}I", count, *offsets) + text + b"".join(samples)
    if rare():
        data = chance.choice([data[:-1], data + b"\0", data[: len(data) // 2]])
    return data


def _array(chance: random.Random, encoding: str, rare: Any) -> bytes:
    code = chance.choice([18, 34, 66])
    if rare():
        code = chance.choice([0, 8, 9, 33, 200])
    _, _, config = encoding.partition(":")
    dtype, _, fixed = config.partition(":")
    item = np.dtype(dtype if dtype in TYPES.values() else TYPES.get(code, "float32")).itemsize
    shape = chance.choice([(4, 2, 2), (1, 4, 2, 2)])
    head = b"" if dtype else bytes([code])
    if not fixed:
        form = chance.randrange(4) if rare(0.2) else 0
        head += bytes([len(shape) << 2 | form])
        head += np.array(shape, f"<u{2**form}").tobytes()
        if rare():
            head = head[:-1] + bytes([chance.randrange(6)])
    count = 16 * item + (chance.choice([-1, 1, item]) if rare() else 0)
    return head + np.random.default_rng(chance.randrange(99)).bytes(count)


def test_mds_reader_hands_out_what_was_read() -> None:
    counts = structures(0, 1500)
    assert counts["disagreed"] == 0
    assert counts["read"] > 600
    assert counts["refused"] > 200
