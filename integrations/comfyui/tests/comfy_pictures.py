"""The bundled pictures as latents of other spaces, and policies whose verdicts are known."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from latentguard import Latents, LatentSpace, load_latents
from latentguard.spaces.preview import linear_rgb

ROOT = Path(__file__).resolve().parents[3]

POLICY = """
schema_version: 1
name: test
version: "1"
uncovered: warn
contrast: [dog, house, landscape, food, flower]
concepts:
  - id: guns
    category: weapons
    prompts: [revolver]
    threshold: {{probability: {threshold}}}
    action: {action}
"""


def bundled(*names: str) -> Latents:
    """Bundled FLUX.2 latents by their names."""
    latents = Latents.cat(list(load_latents(ROOT / "examples" / "latents.pt")))
    return latents.pick([(latents.ids or ()).index(name) for name in names])


def raw(space: str, *names: str) -> Tensor:
    """Latents of another space that have the RGB view of the bundled ones, as a VAE gives them."""
    view = LatentSpace.get(space).rgb_view
    assert view is not None
    assert view.scaled
    rgb = linear_rgb(bundled(*names)) - torch.tensor(view.bias).view(1, 3, 1, 1)
    seen = torch.einsum("brhw,rc->bchw", rgb, torch.linalg.pinv(torch.tensor(view.factors)))
    return Latents(seen, space, scaled=True).to_raw().tensor.contiguous()


def policy_file(folder: Path, action: str = "block", threshold: float = 0.5) -> str:
    """A policy of one concept, revolvers."""
    path = folder / f"{action}-{threshold}.yaml"
    path.write_text(POLICY.format(action=action, threshold=threshold))
    return str(path)
