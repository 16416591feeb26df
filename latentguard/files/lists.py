"""Lists of paths and addresses, as a command line names them: `@shards.txt`, `-`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TextIO

from latentguard.errors import LatentsError
from latentguard.files.addresses import shown
from latentguard.files.remote import local_file

_MAX_LINE = 1 << 16


def listed(arguments: Iterable[str], stdin: TextIO) -> Iterator[str]:
    """The arguments, with each list (`@FILE`, `-`) replaced by its lines.

    Empty lines and lines that begin with # are ignored. Raises LatentsError if a list cannot be
    read, is empty, or names another list.
    """
    for argument in arguments:
        if argument == "-":
            yield from _lines(stdin, "standard input")
        elif argument.startswith("@"):
            yield from _list(argument[1:])
        else:
            yield argument


def _list(name: str) -> Iterator[str]:
    try:
        with local_file(name) as path, path.open(encoding="utf-8") as lines:
            yield from _lines(lines, shown(name))
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise LatentsError(f"the list {shown(name)} cannot be read: {said or error}") from error


def _lines(lines: TextIO, name: str) -> Iterator[str]:
    empty = True
    number = 0
    while line := lines.readline(_MAX_LINE):
        number += 1
        text = line.strip()
        if len(line) == _MAX_LINE:
            raise LatentsError(f"{name}, line {number}: over {_MAX_LINE} characters")
        if not text or text.startswith("#"):
            continue
        if text == "-" or text.startswith("@"):
            raise LatentsError(f"{name}, line {number}: a list cannot name another list")
        empty = False
        yield text
    if empty:
        raise LatentsError(f"{name} lists no file")
