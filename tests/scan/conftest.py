"""Fixtures of the scan room: policies on disk, and the command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scan_helpers import NEVER, Ran, policy_text

from latentguard import cli


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
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `latentguard ARGUMENTS` through its entry point, in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["latentguard", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
