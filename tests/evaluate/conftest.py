"""What several tests of benchmarks use: a small pipeline, a small CLIP, an aesthetic predictor."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from latentguard.evaluate.judges.clip import ClipPictures


@pytest.fixture(scope="session")
def small_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline of 64 px with random weights, as diffusers saves it."""
    pytest.importorskip("torch", reason="generators need torch")
    pytest.importorskip("diffusers", reason="the generators are pipelines of diffusers")
    from small_pipeline import small_stable_diffusion

    made = tmp_path_factory.mktemp("pipeline")
    small_stable_diffusion().save_pretrained(made)
    return made


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipPictures:
    """A small CLIP with random weights, known to open_clip by its name."""
    tmp_path = tmp_path_factory.mktemp("clip")
    torch = pytest.importorskip("torch", reason="CLIP needs torch")
    open_clip = pytest.importorskip("open_clip", reason="CLIP is open_clip's")
    from latentguard.evaluate.judges.clip import ClipPictures

    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32,
                       "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
    }  # fmt: skip
    name = "latentguard-test-clip"
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    weights = tmp_path / "clip.pt"
    torch.save(open_clip.create_model(name).state_dict(), weights)
    return ClipPictures(weights, name)


@pytest.fixture
def predictor() -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """Writes a predictor with random weights, in the published layout, into a folder."""
    torch = pytest.importorskip("torch", reason="the predictor is a file of torch")

    def write(folder: Path, width: int = 16) -> tuple[Path, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        state = {}
        sizes = pairwise((width, 1024, 128, 64, 16, 1))
        for key, (inputs, outputs) in zip((0, 2, 4, 6, 7), sizes, strict=True):
            weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
            state[f"layers.{key}.weight"] = weight
            state[f"layers.{key}.bias"] = torch.randn(outputs, generator=generator)
        file = folder / "predictor.pth"
        torch.save(state, file)
        return file, state

    return write
