"""Fixtures of the scan room: policies on disk, and the command in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from browser import PROGRAM, Browser
from scan_helpers import NEVER, policy_text


@pytest.fixture
def policy(tmp_path: Path) -> Callable[..., Path]:
    """Writes a policy and returns its path."""

    def write(*concepts: tuple[str, str, float], name: str = "made", **keys: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(policy_text(*concepts, **keys), encoding="utf-8")
        return path

    return write


@pytest.fixture
def calm(policy: Callable[..., Path]) -> Path:
    """A policy that allows everything."""
    return policy(("revolver", "block", NEVER), ("wine bottle", "review", NEVER), name="calm")


@pytest.fixture
def pipe() -> Callable[[Path], Callable[[], bytes]]:
    """Makes a named pipe and reads it in the background; the answer gives what came through."""

    def make(path: Path) -> Callable[[], bytes]:
        os.mkfifo(path)
        pool = ThreadPoolExecutor(1)
        reading = pool.submit(path.read_bytes)
        pool.shutdown(wait=False)
        return lambda: reading.result(timeout=60)

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One tab for the tests of a page, which are skipped where there is no browser."""
    assert PROGRAM is not None
    with Browser(PROGRAM) as tab:
        yield tab
