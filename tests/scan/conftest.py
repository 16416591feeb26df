"""Fixtures of the scan room: policies on disk, and the command in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
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
