"""Concepts learned from the bundled photos, in the simplest way: the difference of two means."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from latentguard.encoders import Encoder, load_encoder
from latentguard.encoders.examples import example_features, joint_embedding
from latentguard.files import load_latents
from latentguard.policy.examples import Learned, write_concept
from latentguard.spaces import Latents

EXAMPLES = Path(__file__).parents[1] / "examples" / "latents.pt"
NANO = load_encoder("nano-flux2", "cpu")

POLICY = """
schema_version: 1
name: house
version: "1"
contrast: [dog, house, landscape]
{extra}
concepts:
  - id: handguns
    category: weapons
    examples: guns.safetensors
    threshold: {threshold}
    action: {action}
  - id: either
    category: weapons
    prompts: [rifle, assault rifle]
    contrast: [umbrella]
    examples: guns.safetensors
    threshold: {{probability: 0.5}}
    action: review
  - id: bottles
    category: drinks
    prompts: [beer bottle, wine bottle]
    threshold: {{margin: 0.02}}
    action: review
"""
"""Concepts of all three kinds: examples, prompts, and both."""


def photos() -> Latents:
    """The 25 bundled latents, real ones."""
    return load_latents(EXAMPLES).to(dtype=torch.float32)


def is_gun(latents: Latents) -> list[bool]:
    """Which of the bundled latents are of revolvers."""
    return ["revolver" in name for name in latents.ids or ()]


def entry(
    encoder: Encoder, latents: Latents, positive: Sequence[bool], steepness: float = 2.0
) -> Learned:
    """The means' difference as a head, its bias halfway between them."""
    rows = example_features(encoder, latents).pooled.numpy()
    flags = np.array(positive)
    ends = rows[flags].mean(0), rows[~flags].mean(0)
    weight = steepness * (ends[0] - ends[1])
    return Learned(
        model=encoder.name,
        model_sha256=encoder.sha256,
        space=encoder.space,
        features="trunk" if encoder is NANO else "joint",
        weight=weight.astype(np.float32),
        bias=float(-weight @ (ends[0] + ends[1]) / 2),
        joint=joint_embedding(encoder, latents.pick(np.flatnonzero(~flags))).mean(0).numpy(),
        positives=int(flags.sum()),
        negatives=int((~flags).sum()),
    )


@cache
def of_nano() -> Learned:
    """The head of nano-flux2."""
    return entry(NANO, photos(), is_gun(photos()))


def write_policy(
    folder: Path,
    *more: Learned,
    threshold: str = "{probability: 0.5}",
    action: str = "block",
    extra: str = "",
) -> Path:
    """POLICY with its concept, learned for nano-flux2 and for what is given besides."""
    write_concept(folder / "guns.safetensors", "handguns", [of_nano(), *more])
    path = folder / "house.yaml"
    path.write_text(POLICY.format(threshold=threshold, action=action, extra=extra))
    return path
