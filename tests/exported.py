"""Exports that the tests of several rooms share: tracing a model is what takes the time."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
from filelock import FileLock

from latentguard.encoders.catalog import LatentClipConfig
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.export import Exported, write
from latentguard.files import load_latents
from latentguard.judge import Verdict
from latentguard.policy import Policy, parse_policy
from latentguard.scorer import Scorer
from latentguard.spaces import Latents

EXAMPLES = Path(__file__).parents[1] / "examples" / "latents.pt"

# A Latent-CLIP of FLUX.2 latents: what it says means nothing, but it is traced in a moment.
SECOND = LatentClipConfig(
    patch=8,
    embed_dim=512,
    text_width=128,
    grid=32,
    channels=32,
    width=128,
    layers=2,
    text_layers=2,
    space="flux2",
    needs_scaled=True,
)

UNSURE = 0.17
"""Of the bundled latents nano-flux2 passes on some with it; none of them is within 0.001 of it."""


def by_first(verdict: Verdict) -> bool:
    """Whether the first model of a cascade decided: the reason says so."""
    return verdict.reason.endswith("the first model of the cascade)")


@contextmanager
def tracing_once(folder: Path) -> Iterator[None]:
    """Each model and shape is traced once; all that follows tracing is done anew each time.

    folder: where the graphs are kept, for this process and those beside it.
    """
    trace = write.trace

    def once(scorer: Scorer, *options: Any, **more: Any) -> onnx.ModelProto:
        encoder = scorer.encoder
        own = (encoder.sha256, encoder.name, encoder.dim, getattr(encoder, "resize", None))
        key = repr((*own, *options, *more.items()))
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                part = path.with_suffix(".part")
                part.write_bytes(trace(scorer, *options, **more).SerializeToString())
                part.replace(path)
        return onnx.load(path)

    # pytest would format and keep each of the many messages of torch's tracer.
    logging.getLogger("torch.__trace").propagate = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "trace", once)
        yield


def exported_once(folder: Path, name: str, make: Callable[[Path], Exported]) -> Exported:
    """What `make` exports to `folder`/`name`: by the process that asks first, for all of them."""
    own = folder / name
    about = own / "exported.pickle"
    with FileLock(folder / f"{name}.lock"):
        if not about.exists():
            own.mkdir(exist_ok=True)
            about.write_bytes(pickle.dumps(make(own / "guard.onnx")))
    found: Exported = pickle.loads(about.read_bytes())
    return found


def photos() -> Latents:
    """The 25 bundled latents, real ones."""
    return load_latents(EXAMPLES)


def second() -> LatentCLIP:
    """The second model of the cascades here."""
    return LatentCLIP.random(SECOND)


def two_stages(
    unsure: float | None = UNSURE, first: str = "nano-flux2", guns: float = 0.5
) -> Policy:
    """A policy with two concepts, and with a cascade unless `unsure` is None."""
    cascade = "" if unsure is None else f"cascade: {{first: {first}, unsure: {unsure}}}"
    text = f"""
schema_version: 1
name: two-stages
version: "1"
contrast: [dog, house, landscape]
{cascade}
concepts:
  - id: guns
    category: weapons
    prompts: [revolver, rifle]
    threshold: {{probability: {guns}}}
    action: block
  - id: alcohol
    category: drinks
    prompts: [beer bottle, wine bottle]
    threshold: {{margin: 0.02}}
    action: review
"""
    return parse_policy(text.encode(), "two-stages.yaml")
