"""Fixtures of the encoders' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_reference import SMALL_B4, SMALL_B8, Reference, make_reference


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of these tests lands in, or comes from, the user's caches."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LATENTGUARD_CACHE", str(cache))
    # huggingface_hub reads HF_HOME when it is imported, so its constant is set as well.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return cache


@pytest.fixture(scope="session")
def reference_b8() -> Reference:
    return make_reference(SMALL_B8)


@pytest.fixture(scope="session")
def reference_b4() -> Reference:
    return make_reference(SMALL_B4)


@pytest.fixture
def official(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a checkpoint dict as a file."""

    def write(loaded: Any, name: str = "epoch_34.pt") -> Path:
        path = tmp_path / name
        torch.save(loaded, path)
        return path

    return write
