"""Files are opened only if regular, and replaced together or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from latentguard.atomic import replacing_all, replacing_by_name
from latentguard.regular import (
    RefusedError,
    open_regular,
    problem,
    read_whole,
    regular_descriptor,
    sha256_of,
)
from latentguard.text import first_line


def test_a_regular_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"some bytes")
    with open_regular(path) as file:
        assert sha256_of(file) == hashlib.sha256(b"some bytes").hexdigest()
        assert read_whole(file) == read_whole(file) == b"some bytes"


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_APPEND])
def test_a_pipe_or_device_is_refused_at_once(tmp_path: Path, flags: int) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match=r"not a regular file|No such device") as raised:
            os.close(regular_descriptor(path, flags))
        assert raised.value.errno is not None


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as raised:
        open_regular(tmp_path)
    assert problem(raised.value) == "is not a regular file"


@pytest.mark.parametrize(
    ("name", "said"), [("missing", "No such file or directory"), ("a\0b", "embedded null byte")]
)
def test_what_cannot_be_opened_says_why(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(OSError, match=said) as raised:
        open_regular(tmp_path / name)
    assert problem(raised.value, "opened") == f"cannot be opened: {said}"


@pytest.mark.parametrize("size", [3, 30])
def test_a_file_that_changes_its_size_meanwhile_is_refused(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"some bytes")
    status = path.stat()
    path.write_bytes(b"x" * size)
    with open_regular(path) as file:
        monkeypatch.setattr(os, "fstat", lambda _: status)
        with pytest.raises(RefusedError, match="changed while it was read"):
            read_whole(file)


def test_files_that_belong_together_are_replaced_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: order.append(b.name) or replace(a, b))
    with replacing_all(tmp_path) as (folder, files):
        for name in ("names others", "is named"):
            (folder / name).write_text(name)
            files.append(folder / name)
        assert not (tmp_path / "is named").exists()
    assert order == ["is named", "names others"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(order)


def test_files_that_belong_together_stay_where_one_fails(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with replacing_all(tmp_path) as (folder, files):
            (folder / "a").write_text("new")
            files.append(folder / "a")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_library_that_writes_by_name_replaces_a_file_as_well(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    target.chmod(0o600)
    with replacing_by_name(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  "), "one"),
        (ValueError("x" * 500), "x" * 300),
        (ValueError(), "ValueError"),
    ],
)
def test_the_gist_of_an_error_is_one_line(error: Exception, said: str) -> None:
    assert first_line(error) == said
    assert first_line(ValueError(), "no message") == "no message"
