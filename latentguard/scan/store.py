"""Where a run is stored: a folder, or an address. Each file appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from latentguard.atomic import replacing_by_name
from latentguard.errors import LatentsError, UsageError
from latentguard.files.addresses import filesystem, is_address, shown
from latentguard.files.remote import retried
from latentguard.files.scratch import scratch_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

_PARTIAL = ".part"
# Elsewhere an upload can be seen before it is complete, so it is given another name first.
_WHOLE_UPLOADS = {"s3", "s3a", "gs", "gcs", "abfs", "az", "oss", "oci", "hf", "memory"}


Mine = Callable[[int | None], bool]
"""Told the number of a file, None where it has none."""


def number_of(name: str) -> int | None:
    """The number that a file's name begins with: 12 of `000012-NAME.parquet`."""
    digits = name.partition(".")[0].partition("-")[0]
    return int(digits) if digits.isascii() and digits.isdigit() else None


class Store(ABC):
    """Files under one place, by names with `/`.

    folder: where that is, on this machine; None where it lies elsewhere.
    """

    folder: Path | None = None

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[Path]:
        """An empty file on this machine that becomes `name` when the block ends without error."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The contents of a file; None where there is none."""

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """The files of a folder that are whole, with their sizes in bytes."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one. False where there is."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""

    @abstractmethod
    def clean(self, folder: str, mine: Mine) -> int:
        """Delete the files that killed writers left in a folder. Returns how many there were.

        mine: whether what was written for a file is to be deleted, by the file's number.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole, in place of one that may be there."""
        with self.writing(name) as path:
            path.write_bytes(data)


def open_store(place: str) -> Store:
    """The store at a folder or an address. Raises UsageError where it cannot be used."""
    if place.lower().startswith("file://"):
        place = place[len("file://") :]
    if is_address(place):
        return _Remote(place)
    folder = Path(place)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--run must be a folder, {place} is a file")
    return _Local(folder)


class _Local(Store):
    def __init__(self, folder: Path) -> None:
        self.folder = self._folder = folder

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        number = number_of(target.name)
        # What is left of it, should this process die, says whose it was.
        with replacing_by_name(target, "" if number is None else f"{number:06d}-") as path:
            yield path

    def read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            entries = list(os.scandir(self._folder / folder))
        except FileNotFoundError:
            return {}
        return {e.name: e.stat().st_size for e in entries if not e.name.startswith(".")}

    def create(self, name: str, data: bytes) -> bool:
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", suffix=_PARTIAL, dir=target.parent) as made:
            whole = Path(made) / "file"
            with whole.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(whole, target)
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def clean(self, folder: str, mine: Mine) -> int:
        found = (self._folder / folder).glob(f".*{_PARTIAL}")
        left = [path for path in found if mine(number_of(path.name[1:]))]
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return len(left)


class _Remote(Store):
    def __init__(self, address: str) -> None:
        self._fs: AbstractFileSystem
        self._fs, path = filesystem(address.rstrip("/"))
        self._root, self._shown = path.rstrip("/"), shown(address)
        self._whole = address.partition("://")[0].lower() in _WHOLE_UPLOADS

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with TemporaryDirectory(dir=scratch_folder()) as made:
            path = Path(made) / "file"
            path.touch()
            yield path
            target = f"{self._root}/{name}"
            self._try(f"write {name}", lambda: self._put(path, target))

    def _put(self, path: Path, target: str) -> None:
        if self._whole:
            self._fs.put_file(str(path), target)
            return
        folder, _, name = target.rpartition("/")
        self._fs.makedirs(folder, exist_ok=True)
        partial = f"{folder}/.{name}{_PARTIAL}"
        self._fs.put_file(str(path), partial)
        self._fs.mv(partial, target)

    def read(self, name: str) -> bytes | None:
        def get() -> bytes | None:
            try:
                data: bytes = self._fs.cat_file(f"{self._root}/{name}")
                return data
            except FileNotFoundError:
                return None

        return self._try(f"read {name}", get)

    def sizes(self, folder: str) -> dict[str, int]:
        def get() -> dict[str, int]:
            self._fs.invalidate_cache()
            with suppress(FileNotFoundError):
                listed = self._fs.ls(f"{self._root}/{folder}", detail=True)
                found = {e["name"].rpartition("/")[2]: e for e in listed if e["type"] == "file"}
                return {n: int(e["size"]) for n, e in found.items() if n and n[0] != "."}
            return {}

        return self._try(f"list {folder}", get)

    def create(self, name: str, data: bytes) -> bool:
        target = f"{self._root}/{name}"

        def put() -> bool:
            self._fs.invalidate_cache()
            if self._fs.exists(target):
                return False
            try:
                self._fs.pipe_file(target, data, mode="create")
            except FileExistsError:
                return False
            except (TypeError, NotImplementedError, ValueError):
                # Not every file system knows the mode. There the later of two that begin at the
                # same moment counts, and whoever works on the run compares with what is there.
                self._fs.pipe_file(target, data)
            return True

        return self._try(f"write {name}", put)

    def remove(self, name: str) -> None:
        def delete() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{name}")

        self._try(f"delete {name}", delete)

    def clean(self, folder: str, mine: Mine) -> int:
        if self._whole:
            return 0
        left = []
        with suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            for path in self._fs.ls(f"{self._root}/{folder}", detail=False):
                name = path.rpartition("/")[2]
                if name.endswith(_PARTIAL) and mine(number_of(name.removeprefix("."))):
                    left.append(path)
        for path in left:
            with suppress(FileNotFoundError):  # a writer has just finished it
                self._fs.rm_file(path)
        return len(left)

    def _try(self, what: str, action: Callable[[], Result]) -> Result:
        """Raises UsageError where it fails for good."""
        try:
            return retried(action)
        except LatentsError as error:
            raise UsageError(f"the run at {self._shown}: cannot {what}: it {error}") from error
