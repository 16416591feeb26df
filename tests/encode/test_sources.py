"""Where pictures come from: folders, shards, Parquet files, datasets on disk."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from encode_helpers import (
    hugging_face_table,
    photo_bytes,
    rows,
    save_to_disk,
    write_tar,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.encode.folders import find_pictures
from latentguard.encode.samples import Problem, Sample
from latentguard.encode.sources import Sources, find_sources
from latentguard.encode.tables import Columns
from latentguard.errors import LatentsError

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def walked(sources: Sources) -> list[tuple[Sample, bytes] | Problem]:
    """All samples with their bytes, each read as soon as it is met."""
    found: list[tuple[Sample, bytes] | Problem] = []
    for unit in sources.units:
        for item in unit.samples():
            if isinstance(item, Problem):
                found.append(item)
                continue
            try:
                found.append((item, item.read()))
            except LatentsError as error:
                found.append(Problem(item.source, str(error), item.id))
    return found


def samples(sources: Sources) -> list[Sample]:
    return [item[0] for item in walked(sources) if not isinstance(item, Problem)]


def problems(sources: Sources) -> list[str]:
    return [item.error for item in walked(sources) if isinstance(item, Problem)]


# -- folders ---------------------------------------------------------------------------------


def test_a_folder_of_pictures(photos: Path) -> None:
    (photos / "notes.md").write_text("nothing")
    (photos / "cat" / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    (photos / "stray.txt").write_text("a caption of nothing")
    sources = find_sources([photos], group=2)
    found = samples(sources)
    assert [one.id for one in found] == [
        "cat/a.png", "cat/b.png", "cat/c.png", "dog/a.png", "dog/b.png",
    ]  # fmt: skip
    assert [one.caption for one in found] == [None, "a cat on a chair", None, None, None]
    assert [one.label for one in found] == [None] * 5
    assert [unit.count() for unit in sources.units] == [2, 2, 1]
    assert str(sources.passed) == "1 .md, 1 .txt, 1 .png"


def test_folders_as_labels(photos: Path) -> None:
    sources = find_sources([photos], "folder")
    assert sources.classes == ("cat", "dog")
    assert [(one.label, one.label_name) for one in samples(sources)] == [
        *[(0, "cat")] * 3,
        *[(1, "dog")] * 2,
    ]
    (photos / "stray.png").write_bytes(photo_bytes())
    with pytest.raises(LatentsError, match=r"stray\.png is not in a folder below"):
        find_sources([photos], "folder")


def test_several_folders_and_links(photos: Path) -> None:
    (photos / "cat" / "again").symlink_to(photos)
    found = [one.id for one in samples(find_sources([photos / "cat", photos / "dog"]))]
    assert found == ["cat/a.png", "cat/b.png", "cat/c.png", "cat/again/dog/a.png",
                     "cat/again/dog/b.png", "dog/a.png", "dog/b.png"]  # fmt: skip


def test_nothing_to_encode(tmp_path: Path) -> None:
    with pytest.raises(LatentsError, match="no such file or folder of pictures"):
        find_sources([tmp_path / "missing"])
    with pytest.raises(LatentsError, match=r"no pictures \(\.jpg.*shards or tables \(\.tar"):
        find_sources([tmp_path])
    (tmp_path / "a.psd").write_bytes(b"")
    with pytest.raises(LatentsError, match=r"a\.psd is of an unknown kind"):
        find_sources([tmp_path / "a.psd"])
    with pytest.raises(LatentsError, match="no images"):
        find_pictures([tmp_path])
    with pytest.raises(LatentsError, match="no such image folder"):
        find_pictures([tmp_path / "missing"])


@pytest.fixture
def nobody() -> Iterator[Callable[[], None]]:
    """Called, it takes root's right to list every folder, until the test ends."""
    before = os.geteuid()
    yield lambda: os.seteuid(65534) if before == 0 else None
    os.seteuid(before)


def test_a_folder_that_cannot_be_listed_is_a_problem(nobody: Callable[[], None]) -> None:
    # Not below pytest's own folder, which is its user's alone.
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "cat").mkdir()
        (folder / "cat" / "a.png").write_bytes(photo_bytes(0))
        (folder / "dog").mkdir(mode=0)
        folder.chmod(0o755)
        find_sources([folder])  # loads what it needs with all rights
        nobody()
        found = problems(find_sources([folder]))
        os.seteuid(os.getuid())
        (folder / "dog").chmod(0o755)
    assert found[0].startswith("is a folder that cannot be listed")


def test_captions_that_cannot_be_read(photos: Path) -> None:
    (photos / "cat" / "a.txt").write_bytes(b"\xff\xfe")
    (photos / "cat" / "c.txt").write_bytes(b"x" * (2**20 + 1))
    assert problems(find_sources([photos])) == [
        "its caption a.txt is not UTF-8",
        "its caption c.txt has over 1048576 bytes, which is the limit",
    ]


# -- shards ----------------------------------------------------------------------------------


def test_a_shard(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "000.jpg": photo_bytes(0, kind="JPEG"),
            "000.txt": b"a cat\n",
            "000.cls": b"3",
            "001.json": json.dumps({"caption": "a dog", "url": "x"}).encode(),
            "001.png": photo_bytes(1),
            "sub/002.in.png": photo_bytes(2),
            "sub/002.out.png": photo_bytes(3),
            "003.txt": b"no picture",
            "004.mp4": b"",
        },
    )
    sources = find_sources([shard])
    first, second, third, fourth = samples(sources)
    assert (first.id, first.caption, first.label) == ("000", "a cat", 3)
    assert (second.id, second.caption, second.label) == ("001", "a dog", None)
    assert second.source_metadata == {"caption": "a dog", "url": "x"}
    assert (third.id, fourth.id) == ("sub/002.in.png", "sub/002.out.png")
    assert third.source == f"{shard}::sub/002.in.png"
    assert sources.units[0].count() == 4
    assert str(sources.passed) == "1 .mp4"
    assert [one.label for one in samples(find_sources([shard], "none"))] == [None] * 4


def test_labels_of_a_shard_in_json(tmp_path: Path) -> None:
    good = photo_bytes()
    said = [
        {"label": 3, "class_name": "n01491361", "width": 5},
        {"cls": "n01491361"},
        {"label": [3], "synset": "n01491361"},
        {"label": True},
        {"label": "3"},
        {"label": "shark"},
        {"label": 4},
    ]
    members = {f"{n}.json": json.dumps(values).encode() for n, values in enumerate(said)}
    members |= {f"{n}.png": good for n in range(len(said))} | {"5.cls": b"3", "6.cls": b"3"}
    shard = write_tar(tmp_path / "a.tar", dict(sorted(members.items())))
    assert [(one.label, one.label_name) for one in samples(find_sources([shard]))] == [
        (3, "n01491361"), ("n01491361", None), ("n01491361", None), (None, None), (3, None),
        (3, "shark"),
    ]  # fmt: skip
    assert problems(find_sources([shard])) == [
        "its .cls and its .json have different labels, 3 and 4"
    ]


def test_what_is_wrong_in_a_shard(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    good = photo_bytes()
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "0.png": good, "0.json": b"{",
            "1.png": good, "1.json": b"[]",
            "2.png": good, "2.json": b'{"a":' + deep,
            "3.png": good, "3.txt": b"\xff",
            "4.png": good, "4.txt": b"x" * 2**19,
            "5.png": good,
        },
    )  # fmt: skip
    with tarfile.open(shard, "a") as archive:
        link = tarfile.TarInfo("6.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    sources = find_sources([shard])
    assert problems(sources) == [
        "its .json is not JSON",
        "its .json is not a JSON object",
        "its .json is not JSON",
        "its .txt is not UTF-8",
        "its .txt has 524288 bytes, over the limit of 262144",
        "is not a regular file (a link, or sparse)",
    ]
    assert [one.id for one in samples(sources)] == ["5"]
    shard.write_bytes(shard.read_bytes()[:4000])
    assert any("truncated" in error for error in problems(find_sources([shard])))


# -- tables ----------------------------------------------------------------------------------


def test_parquet_as_hugging_face_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(hugging_face_table(rows()), path, row_group_size=2)
    sources = find_sources([path])
    found = walked(sources)
    assert [item[1] for item in found if not isinstance(item, Problem)] == [
        photo_bytes(n) for n in range(3)
    ]
    first, second, _ = samples(sources)
    assert (first.id, first.caption) == ("0.png", "caption 0")
    assert (second.label, second.label_name) == (1, "dog")
    assert sources.units[0].count() == 3


def test_columns_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    one = photo_bytes()
    pq.write_table(pa.table({"left": [one], "right": [photo_bytes(1)], "what": ["x"]}), path)
    assert (
        "several columns of pictures (left, right): name the one"
        in problems(find_sources([path]))[0]
    )
    sources = find_sources([path], columns=Columns("left", "what", "what"))
    sample, data = walked(sources)[0]  # type: ignore[misc]
    assert (sample.id, sample.caption, sample.label, data) == ("a.parquet/0", "x", "x", one)
    assert "has no column 'middle', only left, right, what" in problems(
        find_sources([path], columns=Columns("middle"))
    )
    assert "has no bytes of pictures in its column 'what'" in problems(
        find_sources([path], columns=Columns("what"))
    )


def test_a_path_without_bytes_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    secret = tmp_path / "secret.png"
    secret.write_bytes(photo_bytes())
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    values = [{"bytes": None, "path": str(secret)}, None]
    pq.write_table(pa.table({"image": pa.array(values, kind)}), path)
    assert (
        problems(find_sources([path]))
        == ["has no bytes of a picture, and its path is not followed"] * 2
    )


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "data", rows(5))
    with pa.OSFile(str(folder / "cache-123.arrow"), "wb") as file:
        file.write(b"what map() left")
    sources = find_sources([folder])
    found = samples(sources)
    assert [one.id for one in found] == [f"{n}.png" for n in range(5)]
    assert [one.label_name for one in found] == ["cat", "dog", "cat", "dog", "cat"]
    assert [item[1] for item in walked(sources) if not isinstance(item, Problem)] == [
        photo_bytes(n) for n in range(5)
    ]


def test_a_dataset_that_names_files_elsewhere(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "data", rows(2))
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    assert problems(find_sources([folder])) == ["names files outside its folder"]


def write_arrow(path: Path, table: Any, **options: Any) -> Path:
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer,
    ):
        writer.write_table(table)
    return path


def test_arrow_files(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", hugging_face_table(rows()))
    assert len(samples(find_sources([path]))) == 3
    write_arrow(path, hugging_face_table(rows()), compression="lz4")
    assert problems(find_sources([path])) == [
        "is compressed, which is not supported for an Arrow file of pictures"
    ]
    table = pa.table({"image": [photo_bytes()], "text": pa.array(["x"]).dictionary_encode()})
    write_arrow(path, table)
    assert "encoded by a dictionary" in problems(find_sources([path]))[0]
    path.write_bytes(b"ARROW1\0\0 nothing of the kind")
    assert "damaged Arrow file" in problems(find_sources([path]))[0]


ARROW = io.BytesIO()
with pa.ipc.new_stream(ARROW, hugging_face_table(rows(2)).schema) as _writer:
    _writer.write_table(hugging_face_table(rows(2)))


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 2**16)),
)
def test_changed_arrow_files_are_rows_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray(ARROW.getvalue())
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path_factory.mktemp("arrow") / "a.arrow"
    path.write_bytes(bytes(data) if cut is None else bytes(data)[: cut % len(data)])
    unit = find_sources([path]).units[0]
    for item in unit.samples():
        one_line = item.error if isinstance(item, Problem) else _read(item, len(data))
        assert "\n" not in one_line


def _read(sample: Sample, most: int) -> str:
    """Why its bytes cannot be read; nothing where they can."""
    try:
        assert len(sample.read()) <= most
    except LatentsError as error:
        return str(error)
    return ""
