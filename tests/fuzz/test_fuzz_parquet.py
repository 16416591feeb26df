"""Structures of Parquet files: what is read here is what pyarrow's own table hands out."""

from __future__ import annotations

import io
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from fuzz_helpers import compared_rows

from latentguard.errors import LatentsError
from latentguard.files.options import Reading
from latentguard.files.parquet import read_parquet
from latentguard.files.passed_over import PassedOver

pa = pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)
pq = pytest.importorskip(
    "pyarrow.parquet", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)


def structures(seed: int, count: int) -> Counter[str]:
    """Build and compare `count` files; keys: tried, read, refused, disagreed."""
    counts: Counter[str] = Counter()
    for index in range(seed, seed + count):
        compared_rows(counts, f"parquet {index}", built(random.Random(index)), _ours, library)
    return counts


def _ours(data: bytes) -> Any:
    """The array of each row; None for one with an error."""
    reading = Reading.of("sd1", height=2, width=2)
    for row in read_parquet(io.BytesIO(data), len(data), reading, PassedOver()):
        if isinstance(row, LatentsError):
            yield None
            continue
        try:
            images = list(row.open(row.claims.merged(reading.said(), "", "")).images())
        except LatentsError:
            yield None
            continue
        yield None if len(images) != 1 or isinstance(images[0], LatentsError) else images[0]


def library(data: bytes) -> list[Any]:
    """Each value of the column `latents`, as NumPy has it."""
    column = pq.read_table(io.BytesIO(data))["latents"]
    kind = column.type
    tensors = isinstance(kind, pa.FixedShapeTensorType)
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or hasattr(kind, "list_size"):
        kind = kind.value_type
    found: list[Any] = []
    for value in column:
        plain = value.as_py()
        if plain is None:
            found.append(None)
        elif isinstance(plain, bytes):
            try:
                found.append(np.load(io.BytesIO(plain)))
            except (ValueError, EOFError):
                found.append(None)
        else:
            dtype = value.type.value_type.to_pandas_dtype() if tensors else kind.to_pandas_dtype()
            try:
                found.append(np.array(plain, dtype))
            except (ValueError, TypeError):
                found.append(None)
    return found


def built(chance: random.Random) -> bytes:
    """A file of pyarrow's, of any layout that it writes, here and there damaged."""
    rows = chance.randint(1, 12)
    dtype = chance.choice([np.float16, np.float32, np.float64])
    random_numbers = np.random.default_rng(chance.randrange(1000))
    arrays = random_numbers.standard_normal((rows, 4, 2, 2)).astype(dtype)
    if chance.random() < 0.3:
        arrays[:] = arrays[:1]  # a dictionary of one value
    table = pa.table({"latents": _column(chance, arrays), "key": [f"k{n}" for n in range(rows)]})
    stream = io.BytesIO()
    pq.write_table(
        table,
        stream,
        row_group_size=chance.choice([1, 3, 100]),
        compression=chance.choice(["none", "snappy", "zstd", "gzip", "lz4", "brotli"]),
        use_dictionary=chance.random() < 0.5,
        data_page_version=chance.choice(["1.0", "2.0"]),
        data_page_size=chance.choice([64, 10**6]),
        write_page_checksum=True,
        version=chance.choice(["1.0", "2.4", "2.6"]) if dtype != np.float16 else "2.6",
    )
    data = bytearray(stream.getvalue())
    if chance.random() < 0.3:
        # Only the footer: a page that is damaged without a checksum may read as anything.
        for _ in range(chance.randint(1, 4)):
            at = len(data) - 1 - chance.randrange(min(len(data), 400))
            data[at] = chance.randrange(256)
    return bytes(data)


def _column(chance: random.Random, arrays: np.ndarray[Any, Any]) -> Any:
    values: Any = arrays.tolist()
    leaf = pa.from_numpy_dtype(arrays.dtype)
    kind = chance.choice(["npy", "lists", "fixed", "flat", "tensor"])
    if kind == "tensor":
        return pa.FixedShapeTensorArray.from_numpy_ndarray(arrays)
    if kind == "npy":
        values = []
        for array in arrays:
            stream = io.BytesIO()
            np.save(stream, array)
            values.append(stream.getvalue())
    if kind == "flat":
        values = [array.ravel().tolist() for array in arrays]
    if chance.random() < 0.2:
        place = chance.randrange(len(values))
        values[place] = chance.choice([None, values[place][:1], values[place][:-1]])
    if kind == "fixed" and None not in values and all(len(value) == 4 for value in values):
        return pa.array(values, pa.list_(pa.list_(pa.list_(leaf, 2), 2), 4))
    types = {
        "npy": chance.choice([pa.binary(), pa.large_binary()]),
        "flat": pa.list_(leaf),
        "lists": pa.list_(pa.large_list(pa.list_(leaf))),
    }
    return pa.array(values, types.get(kind, types["lists"]))


def test_pyarrow_hands_out_what_was_read() -> None:
    counts = structures(0, 400)
    assert counts["disagreed"] == 0
    assert counts["read"] > 150
    assert counts["refused"] > 40
