"""Tables of latents: Parquet, and MosaicML's MDS."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_helpers import mds_bytes, npy_bytes, only_error, read_all, torch_bytes, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.errors import LatentsError
from latentguard.files import PassedOver, Record, load_latents, parquet, read_arrays
from latentguard.files.parquet import read_parquet

pa = pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)
pq = pytest.importorskip(
    "pyarrow.parquet", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)

MDS = Path(__file__).parent / "mds"
LATENTS = np.load(MDS / "latents.npy")
SINGLE = LATENTS.astype(np.float32)
SD: dict[str, Any] = {"space": "sd1", "scaled": True}
KEYS = [f"k{number}" for number in range(8)]


def good(path: Path, **said: Any) -> list[Record]:
    records = read_all(path, **said)
    assert [record.error for record in records] == [None] * len(records)
    return records


def numbers(records: list[Record]) -> np.ndarray[Any, Any]:
    return np.stack([r.latents.tensor[0].numpy() for r in records if r.latents is not None])


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=3, **options)
    return path


# -- Parquet ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
@pytest.mark.parametrize(
    "column",
    [
        pa.array([npy_bytes(one) for one in LATENTS]),
        pa.array([npy_bytes(one) for one in LATENTS], pa.large_binary()),
        pa.array([torch_bytes(torch.from_numpy(one)) for one in LATENTS]),
        pa.array(LATENTS.tolist(), pa.list_(pa.list_(pa.list_(pa.float16())))),
        pa.array(LATENTS.tolist(), pa.large_list(pa.list_(pa.list_(pa.float16(), 4), 4))),
        pa.FixedShapeTensorArray.from_numpy_ndarray(LATENTS),
    ],
    ids=["npy", "large", "pt", "lists", "fixed lists", "tensors"],
)
def test_parquet(tmp_path: Path, compression: str, column: Any) -> None:
    columns = {"__key__": KEYS, "caption": ["a cat"] * 8, "latents": column}
    records = good(write(tmp_path / "a.parquet", columns, compression=compression), **SD)
    assert [record.id for record in records] == KEYS
    assert [record.index for record in records] == list(range(8))
    assert records[7].source == f"{tmp_path}/a.parquet::row 7"
    assert numbers(records).dtype == np.float16
    assert np.array_equal(numbers(records), LATENTS)


def test_flat_lists_need_a_shape(tmp_path: Path) -> None:
    flat = [one.ravel() for one in SINGLE]
    path = write(tmp_path / "a.parquet", {"id": range(8), "latents": flat})
    assert "64 numbers have no shape" in (read_all(path, **SD)[0].error or "")
    records = good(path, **SD, height=4, width=4)
    assert np.array_equal(numbers(records), SINGLE)
    assert records[3].id == "3"
    pixels = good(path, **SD, height=32, width=32, pixels=True)
    assert np.array_equal(numbers(pixels), SINGLE)
    assert "are not of shape [4, 4, 8]" in (read_all(path, **SD, height=4, width=8)[0].error or "")
    shaped = write(tmp_path / "b.parquet", {"latents": flat, "shape": [[4, 4, 4]] * 8})
    assert np.array_equal(numbers(good(shaped, **SD)), SINGLE)
    wrong = write(tmp_path / "c.parquet", {"latents": flat, "shape": [[4, 4, -4]] * 8})
    assert "shape must be a list of sizes" in (read_all(wrong, **SD)[0].error or "")


def test_bare_numbers_and_whole_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"vae": [one.tobytes() for one in LATENTS]})
    said = {"dtype": "float16", "height": 4, "width": 4}
    assert np.array_equal(numbers(good(path, **SD, **said)), LATENTS)
    assert "say --dtype, --space" in (read_all(path, **SD)[0].error or "")
    bits = pa.array([(one.view(np.uint16) >> 8).astype(np.uint8).ravel() for one in LATENTS])
    path = write(tmp_path / "b.parquet", {"latents": bits})
    assert "say --dequantize" in (read_all(path, **SD, height=4, width=4)[0].error or "")
    assert len(good(path, **SD, height=4, width=4, dequantize=(0.1, 127.5))) == 8


def test_what_rows_and_the_file_say(tmp_path: Path) -> None:
    columns = {
        "latents": SINGLE.tolist(),
        "space": ["sd1"] * 7 + ["sdxl"],
        "scaled": [True] * 6 + [False, None],
    }
    path = write(tmp_path / "a.parquet", columns)
    records = read_all(path, scaled=True)
    assert [record.error for record in records[:6]] == [None] * 6
    assert "the file says scaled False" in (records[6].error or "")
    assert records[7].latents is not None
    assert records[7].latents.space.name == "sdxl"
    table = pa.table({"latents": SINGLE.tolist()})
    table = table.replace_schema_metadata({"space": "sd1", "scaled": "true"})
    pq.write_table(table, path)
    assert len(good(path)) == 8
    assert "says space 'sd1'" in (read_all(path, space="sdxl")[0].error or "")


def test_which_column(tmp_path: Path) -> None:
    arrays = [npy_bytes(one) for one in SINGLE]
    path = write(tmp_path / "a.parquet", {"clean": arrays, "noisy": arrays})
    assert "holds clean, noisy: save the numbers that are latents (clean?)" in only_error(path)
    passed = PassedOver()
    records = list(read_arrays(path, **SD, passed=passed, key="clean"))
    assert [record.error for record in records] == [None] * 8
    assert passed.line() == "skipped on request: 1 other array (--key)"
    assert "needs a column 'x' of bytes or numbers" in only_error(path, **SD, key="x")
    path = write(tmp_path / "b.parquet", {"latents": arrays, "noisy": arrays})
    assert "that could be latents but were not looked at" in (read_all(path, **SD)[-1].error or "")
    beside = {
        "jpg": [b"\xff\xd8"] * 8, "prompt_embeds": np.ones((8, 768)).tolist(), "score": [0.5] * 8,
        "boxes": [[[0.0, 1.0]]] * 8, "features": np.ones((8, 64)).tolist(), "tags": [["a"]] * 8,
    }  # fmt: skip
    good(write(tmp_path / "c.parquet", {"latents": arrays, **beside}), **SD)
    path = write(tmp_path / "d.parquet", {"latents": arrays, "jpg": arrays})
    assert "could be latents in the column 'jpg'" in only_error(path, **SD)


_ARRAYS = [npy_bytes(one) for one in SINGLE]
_FLAT = SINGLE.reshape(8, -1)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(_ARRAYS).dictionary_encode(),
        pa.array(_ARRAYS, pa.binary_view()),
        pa.array([[one] for one in _ARRAYS]),
        pa.array(_FLAT.tolist(), pa.list_view(pa.float32())),
        pa.array((_FLAT.view(np.uint32) >> 16).astype(np.uint16).tolist(), pa.list_(pa.uint16())),
        pa.array([[{"row": row} for row in one] for one in _FLAT[:, :2].tolist()]),
    ],
    ids=["dictionary", "view", "lists of bytes", "list view", "bits of bfloat16", "structures"],
)
def test_a_second_column_is_not_passed_over_for_how_it_is_stored(
    tmp_path: Path, column: Any
) -> None:
    columns = {"latents": _ARRAYS, "latents_b": column}
    records = read_all(write(tmp_path / "a.parquet", columns), **SD)
    assert "could be latents but were not looked at (latents_b)" in (records[-1].error or "")
    # Under a harmless name it is looked into.
    if column.type in (pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())):
        path = write(tmp_path / "b.parquet", {"latents": _ARRAYS, "image": column})
        assert "could be latents in the column 'image'" in only_error(path, **SD)


def test_columns_of_other_types_are_passed_over(tmp_path: Path) -> None:
    beside = {
        "caption": pa.array(["a cat"] * 8).dictionary_encode(),
        "label": pa.array([1] * 8, pa.uint16()),
        "tokens": pa.array([[1, 2, 3]] * 8, pa.list_(pa.int32())),
        "uuid": pa.array([bytes(16)] * 8, pa.binary(16)).cast(pa.uuid())
        if hasattr(pa, "uuid")
        else pa.array([1] * 8),
        "when": pa.array([0] * 8, pa.timestamp("ms")),
        "price": pa.array([None] * 8, pa.decimal128(5, 2)),
        "nothing": pa.nulls(8),
        "flag": [True] * 8,
    }
    good(write(tmp_path / "a.parquet", {"latents": _ARRAYS, **beside}), **SD)


def test_cells_that_are_no_latents(tmp_path: Path) -> None:
    ragged = SINGLE.tolist()
    ragged[1][0][0] = [1.0]
    ragged[2] = None
    ragged[3][0][0][0] = None
    ragged[4][0] = None
    ragged[5] = []
    errors = [r.error for r in read_all(write(tmp_path / "a.parquet", {"latents": ragged}), **SD)]
    assert [error is None for error in errors] == [True] + [False] * 5 + [True] * 2
    assert "differ in length" in (errors[1] or "")
    assert "its value is null" in (errors[2] or "")
    assert "numbers are null" in (errors[3] or "")
    cells = [npy_bytes(SINGLE[0]), b"x", b"", None, npy_bytes(SINGLE[0])[:-1], npy_bytes(SINGLE[0])]
    errors = [r.error for r in read_all(write(tmp_path / "b.parquet", {"latents": cells}), **SD)]
    assert [error is None for error in errors] == [True, False, False, False, False, True]


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"latents": [npy_bytes(one) for one in SINGLE]})
    data = path.read_bytes()
    for damaged, message in (
        (data[:-1], "its footer is not at its end"),
        (b"PARE" + data[4:], "truncated or encrypted"),
        (data[:100], "its footer is not at its end"),
        (data[:-8] + (2**31).to_bytes(4, "little") + b"PAR1", "its footer is not at its end"),
        (data[:-8] + (4).to_bytes(4, "little") + b"PAR1", "is a damaged Parquet file"),
    ):
        path.write_bytes(damaged)
        assert message in only_error(path, **SD)
    two = pa.Table.from_arrays([pa.array([b"x"]), pa.array([b"y"])], ["latents", "latents"])
    pq.write_table(two, path)
    assert "two columns of the same name" in only_error(path, **SD)


def repeated(folder: Path, rows: int) -> tuple[Path, bytes]:
    """One value, stored once in a dictionary, and mentioned by many rows."""
    value, path = npy_bytes(np.zeros((4, 64, 64), np.float32)), folder / "a.parquet"
    pq.write_table(pa.table({"latents": [value] * rows}), path, compression="zstd")
    return path, value


def test_a_parquet_file_that_grows_out_of_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, value = repeated(tmp_path, 3000)
    monkeypatch.setattr(parquet, "MIN_INFLATED", 20 * len(value))
    monkeypatch.setattr(parquet, "MAX_BATCH_BYTES", 10)
    records = read_all(path, **SD)
    assert len(records) < 2000
    assert "describes rows of over 64 times what it stores" in (records[-1].error or "")
    monkeypatch.setattr(parquet, "MAX_RATIO", 0)
    monkeypatch.setattr(parquet, "MIN_INFLATED", 10)
    assert "write smaller row groups" in only_error(path, **SD)


def test_of_large_values_one_is_held_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, value = repeated(tmp_path, 300)
    sizes = []
    bounded = parquet.bounded

    def watched(found: Any, size: int) -> Any:
        for batch in bounded(found, size):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(parquet, "bounded", watched)
    assert len(read_all(path, **SD)) == 300
    assert max(sizes) < 2 * len(value)


def test_numbers_that_repeat_are_no_way_around_the_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"latents": [[0.0] * 2_000_000] * 2}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(parquet, "MIN_INFLATED", 10_000_000)
    assert "holds a part of 16000000 bytes" in only_error(path, **SD)


@pytest.mark.parametrize("group", [1, 1000])
def test_rows_are_read_some_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    """Row group by row group, and pages of it."""
    monkeypatch.setattr(parquet, "MIB", 10_000)
    monkeypatch.setattr(parquet, "MAX_BATCH_BYTES", 100_000)

    class Counting(io.BytesIO):
        taken = 0

        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer)
            Counting.taken += count
            return count

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            Counting.taken += len(data)
            return data

    path = tmp_path / "a.parquet"
    noise = np.random.default_rng(0).standard_normal((30, 4, 64, 64)).astype(np.float32)
    table = pa.table({"latents": [npy_bytes(one) for one in noise]})
    pq.write_table(
        table, path, row_group_size=group, compression="none", use_dictionary=False,
        data_page_size=100_000, write_batch_size=1,
    )  # fmt: skip
    data = path.read_bytes()
    from latentguard.files.options import Reading

    rows = read_parquet(Counting(data), len(data), Reading(), PassedOver())
    next(rows)
    assert Counting.taken < len(data) / 5


def test_without_pyarrow_the_extra_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"latents": [npy_bytes(one) for one in SINGLE]})
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from latentguard.files import read_arrays\n"
        f"for path in ({str(path)!r}, {str(MDS / 'zstd')!r}):\n"
        "    (record,) = read_arrays(path)\n"
        "    print(record.error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sentence = "needs pyarrow, which is not installed: pip install 'latentguard[scale]'"
    assert ran.stdout.splitlines() == [sentence, sentence]


def test_the_list_of_pictures_of_img2dataset(tmp_path: Path) -> None:
    """It writes 00000.parquet beside 00000.tar: text and numbers about each picture."""
    columns: dict[str, Any] = {
        "url": ["https://example.com/a.jpg"], "caption": ["a cat"], "key": ["000"],
        "status": ["success"], "error_message": pa.nulls(1, pa.string()), "width": [64],
        "height": [48], "original_width": [640], "original_height": [480],
    }  # fmt: skip
    path = write(tmp_path / "00000.parquet", columns)
    write_tar(tmp_path / "00000.tar", {"000.npy": npy_bytes(SINGLE[0])})
    passed = PassedOver()
    (record,) = read_arrays(tmp_path, **SD, passed=passed, member="npy")
    assert record.error is None
    assert passed.names == ["00000.parquet"]
    assert "is a list of pictures, and with --strict" in only_error(path, **SD, strict=True)
    with pytest.raises(LatentsError, match="holds no latents"):
        load_latents(path)
    write(path, {**columns, "latents": [npy_bytes(SINGLE[0])]})
    assert len(good(path, **SD)) == 1
    write(path, {name: columns[name] for name in ("caption", "width")})
    assert "needs one column of latents" in only_error(path, **SD)


# -- MDS -------------------------------------------------------------------------------------


def test_mds_of_its_writer() -> None:
    records = good(MDS / "plain", **SD)
    assert [record.id for record in records] == KEYS
    assert records[0].source == f"{MDS}/plain/shard.00000.mds::sample 0"
    assert records[7].source.startswith(f"{MDS}/plain/shard.00001.mds::sample ")
    assert np.array_equal(numbers(records), SINGLE)
    records = good(MDS / "fixed", **SD)
    assert [record.id for record in records] == [str(number) for number in range(8)]
    assert np.array_equal(numbers(records), LATENTS)


def test_bare_numbers_of_mds() -> None:
    said = {"key": "latents_256", "dtype": "float16", "height": 4, "width": 4}
    assert np.array_equal(numbers(good(MDS / "zstd", **SD, **said)), LATENTS)
    assert "one column of latents" in only_error(MDS / "zstd", **SD)
    records = good(MDS / "int8", **SD, height=4, width=4, dequantize="imagenet.int8")
    np.testing.assert_allclose(numbers(records), SINGLE, atol=12.01 / 255)


def test_damaged_zstd(tmp_path: Path) -> None:
    path = tmp_path / "a.mds.zstd"
    columns = {"latents": ("ndarray", None)}
    data = mds_bytes(columns, [{"latents": encoded(one)} for one in SINGLE])
    whole = bytes(pa.compress(data, "zstd", asbytes=True))
    path.write_bytes(whole)
    assert len(good(path, **SD)) == 8
    for damaged, message in (
        (whole + b"more", "is a truncated or damaged zstd file"),
        (whole[:-5], "is a truncated or damaged zstd file"),
        (whole + whole, "more data follows after its last sample"),
        (data, "is a truncated or damaged zstd file"),
    ):
        path.write_bytes(damaged)
        assert message in (read_all(path, **SD)[-1].error or "")


def test_nothing_of_an_mds_folder_is_passed_over() -> None:
    passed = PassedOver()
    list(read_arrays(MDS / "plain", **SD, passed=passed))
    assert passed.line() == ""


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "mds"
    shutil.copytree(MDS / "plain", folder)
    (folder / "shard.00001.mds").unlink()
    first, *rest = read_all(folder, **SD)
    assert first.error == "is named by index.json but does not exist"
    assert first.source == str(folder / "shard.00001.mds")
    assert all(record.error is None for record in rest)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", 1),
        ("column_names", ["a", "b", "c", "d", "e", "f"]),
        ("column_encodings", ["str"] * 6),
        ("raw_data", {"basename": "shard.00000.mds", "bytes": 1}),
    ],
)
def test_an_index_that_says_otherwise(tmp_path: Path, key: str, value: Any) -> None:
    """StreamingDataset reads columns by it."""
    folder = tmp_path / "mds"
    shutil.copytree(MDS / "plain", folder)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0][key] = value
    (folder / "index.json").write_text(json.dumps(index))
    records = read_all(folder, **SD)
    assert records[0].error == f"does not agree with its index.json ({key})"
    assert records[1].error is None


def test_an_index_of_another_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mds"
    shutil.copytree(MDS / "plain", folder)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../shard.00000.mds"
    (folder / "index.json").write_text(json.dumps(index))
    assert "of another folder" in (read_all(folder, **SD)[0].error or "")
    (folder / "index.json").write_text('{"a": 1}')
    passed = PassedOver()
    assert all(r.error is None for r in read_arrays(folder, **SD, passed=passed))
    assert passed.files == {".json": 1}


COLUMNS: dict[str, tuple[str, int | None]] = {"key": ("str", None), "latents": ("ndarray", None)}


def encoded(array: np.ndarray[Any, Any]) -> bytes:
    """As the encoding `ndarray` has it, for float32."""
    return bytes([34, array.ndim << 2, *array.shape]) + array.tobytes()


def test_samples_that_are_no_latents(tmp_path: Path) -> None:
    whole = encoded(SINGLE[0])
    cells = [
        whole, b"", b"\x22", whole[:-1], bytes([99]) + whole[1:], bytes([34, 255]) + whole[2:],
        bytes([34, 12, 0, 4, 4]), bytes([33]) + whole[1:], whole,
    ]  # fmt: skip
    path = tmp_path / "a.mds"
    path.write_bytes(mds_bytes(COLUMNS, [{"key": b"a", "latents": cell} for cell in cells]))
    errors = [record.error for record in read_all(path, **SD)]
    assert [error is None for error in errors] == [True, *[False] * 7, True]


def test_damaged_and_hostile_mds(tmp_path: Path) -> None:
    path = tmp_path / "a.mds"
    sample = {"key": b"a", "latents": encoded(SINGLE[0])}
    data = mds_bytes(COLUMNS, [sample, sample])
    late = int.from_bytes(data[8:12], "little")

    def with_offset(number: int, value: int) -> bytes:
        at = 4 + 4 * number
        return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]

    for damaged, message in (
        (data + b"x", "more data follows after its last sample"),
        (data[:-1], "is not where it should be"),
        (b"\xff\xff\xff\xff" + data[4:], "announces 4294967295 samples"),
        (with_offset(0, 3), "its first sample does not follow its header"),
        (with_offset(1, late - 1), "its values do not fit"),
        (with_offset(1, 2**32 - 1), "is not where it should be"),
        (data.replace(b'"mds"', b'"csv"'), "not an MDS shard of version 2"),
        (data.replace(b'"latents"', b'"key"    '), "is a damaged MDS shard"),
        (data.replace(b'"ndarray"', b'"ndarray'), "does not describe its columns"),
        (b"\0" * 8, "holds no sample"),
    ):
        path.write_bytes(damaged)
        errors = [record.error or "" for record in read_all(path, **SD)]
        assert any(message in error for error in errors), (message, errors)


def test_pickles_of_mds_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.mds"
    columns = {**COLUMNS, "more": ("pkl", None)}
    sample = {"key": b"a", "latents": encoded(SINGLE[0]), "more": b"\x80\x04N."}
    path.write_bytes(mds_bytes(columns, [sample]))
    first, second = read_all(path, **SD)
    assert first.error is None
    assert "(more)" in (second.error or "")
    good(path, **SD, key="latents")


def test_latents_in_a_column_of_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.mds"
    sample = {"key": b"a", "latents": encoded(SINGLE[0]), "jpg": b"\xff\xd8\xff"}
    columns = {**COLUMNS, "jpg": ("bytes", None)}
    path.write_bytes(mds_bytes(columns, [sample, {**sample, "jpg": npy_bytes(SINGLE[1])}, sample]))
    errors = [record.error for record in read_all(path, **SD)]
    assert [error is None for error in errors] == [True, False, True]
    assert "sample 1: holds what could be latents in the column 'jpg'" in (errors[1] or "")
    assert len(good(path, **SD, key="latents")) == 3


ENCODINGS = st.sampled_from(
    ["ndarray", "ndarray:float32", "ndarray:float32:4,4,4", "bytes", "float32", "str", "pkl", "x"]
)


@settings(max_examples=150, deadline=None)
@given(
    encoding=ENCODINGS,
    size=st.none() | st.integers(0, 300),
    cell=st.binary(max_size=80) | st.just(encoded(SINGLE[0])) | st.just(SINGLE[0].tobytes()),
)
def test_whatever_a_shard_says(
    tmp_path_factory: pytest.TempPathFactory, encoding: str, size: int | None, cell: bytes
) -> None:
    path = tmp_path_factory.mktemp("mds") / "a.mds"
    path.write_bytes(mds_bytes({"latents": (encoding, size)}, [{"latents": cell}]))
    for record in read_all(path, **SD, dtype="float32", height=4, width=4):
        if record.latents is not None:
            assert record.latents.tensor.numpy().tobytes() in cell
