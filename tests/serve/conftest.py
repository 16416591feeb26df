"""Fixtures of the serving tests: an exported file, and real latents for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LATENTS = EXAMPLES / "latents.pt"
# The example is a folder of scripts, as its users run them.
sys.path.insert(0, str(EXAMPLES / "serve"))


@pytest.fixture(scope="session")
def guard_file(traced_once: None, shared_folder: Path) -> Path:
    """nano-flux2 under the family policy, as one .onnx file for latents of 32x32 cells."""
    from exported import exported_once, photos

    from latentguard.export import Exported, export_onnx

    def make(out: Path) -> Exported:
        return export_onnx("family", "nano-flux2", out, size=(32, 32), check=photos()[:2])

    return exported_once(shared_folder, "guard_file", make).path


@pytest.fixture(scope="session")
def latents() -> np.ndarray[Any, np.dtype[np.float32]]:
    """The bundled latents, [25, 32, 32, 32]: flux2, scaled."""
    pytest.importorskip("torch", reason="the bundled latents are a .pt file")
    from latentguard.files import load_latents

    array: np.ndarray[Any, np.dtype[np.float32]] = load_latents(LATENTS).tensor.float().numpy()
    return array
