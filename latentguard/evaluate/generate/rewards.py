"""Encoders by name, of latents or of the pixels that a generator decodes."""

from __future__ import annotations

import re
from pathlib import Path

from latentguard.encoders import Encoder, best_encoder, load_encoder
from latentguard.errors import UsageError
from latentguard.evaluate.generate.generators import Generator
from latentguard.evaluate.generate.pixel_encoder import PixelEncoder
from latentguard.guard.layout import space_of

FORMS = "latent:MODEL or pixel:ARCHITECTURE:WEIGHTS"


def encoder_named(name: str, generator: Generator) -> Encoder:
    """The encoder of a reward, for a generator's latents.

    name: `latent:MODEL`, with a model as `--model` takes it, or `pixel:ARCHITECTURE:WEIGHTS` for a
        CLIP of open_clip on decoded pictures.
    Raises UsageError for another form, and ModelError where the model cannot be had.
    """
    kind, _, rest = name.partition(":")
    space = space_of(generator.pipe, generator.space)
    device = generator.pipe._execution_device
    if kind == "latent" and rest:
        model = best_encoder(space.name) if rest == "auto" else rest
        return load_encoder(model, device, space)
    architecture, _, weights = rest.partition(":")
    if kind == "pixel" and architecture and weights:
        return PixelEncoder(architecture, weights, generator.decode, space, device)
    raise UsageError(f"a reward must be {FORMS}, got {name!r}")


def arm_name(name: str) -> str:
    """The arm of a reward, as a folder's name: of a file the name alone, without its suffix."""
    kind, _, rest = name.partition(":")
    parts = [kind, *rest.split(":", 1)] if kind == "pixel" else [kind, rest]
    parts[-1] = Path(parts[-1]).stem if "/" in parts[-1] else parts[-1]
    return "reno-" + "-".join(re.sub(r"[^A-Za-z0-9.+=-]+", "-", part) for part in parts)
