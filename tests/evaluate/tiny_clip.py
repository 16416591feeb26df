"""A CLIP of open_clip small enough for tests, with random weights in a file."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch

NAME = "tiny-clip-for-tests"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def tiny_clip(folder: Path) -> tuple[str, str]:
    """Make the model known to open_clip, and give its name and its weights' file."""
    config, weights = folder / f"{NAME}.json", folder / "weights.pt"
    config.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    torch.save(open_clip.create_model(NAME).state_dict(), weights)
    return NAME, str(weights)
