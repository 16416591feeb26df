"""One real export for the whole room, and the latents that come with latentguard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs torch")
pytest.importorskip("onnx", reason="exporting needs the onnx extra")
pytest.importorskip("onnxruntime", reason="the runtime needs the onnx extra")

from exported import exported_once, photos  # noqa: E402

from latentguard.export import Exported, export_onnx  # noqa: E402
from latentguard.files import load_latents  # noqa: E402
from latentguard.runtime import Guard  # noqa: E402
from latentguard.spaces import Latents  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def artifact(traced_once: None, shared_folder: Path) -> Path:
    """nano-flux2 with the policy `family` and heat maps, exported by latentguard itself."""

    def make(out: Path) -> Exported:
        # The room compares it with PyTorch on all images.
        options: dict[str, Any] = {"size": (32, 32), "heatmaps": True, "check": photos()[:2]}
        return export_onnx("family", "nano-flux2", out, **options)

    return exported_once(shared_folder, "artifact", make).path


@pytest.fixture(scope="session")
def guard(artifact: Path) -> Guard:
    return Guard(artifact, threads=1)


@pytest.fixture(scope="session")
def latents() -> Latents:
    return load_latents(ROOT / "examples" / "latents.pt")


@pytest.fixture(scope="session")
def arrays(latents: Latents) -> np.ndarray:
    """The same as float32 [25, 32, 32, 32]."""
    numbers: np.ndarray = latents.tensor.float().numpy()
    return numbers
