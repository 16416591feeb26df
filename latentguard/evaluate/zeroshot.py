"""Zero-shot classification of latents: each image takes the class whose name is most like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from latentguard.encoders import Encoder, best_encoder, load_encoder, needs_space
from latentguard.errors import LatentsError, ModelError
from latentguard.evaluate.metrics import Interval, ranks_of, wilson
from latentguard.evaluate.reading import batches
from latentguard.evaluate.templates import check_templates

TEMPLATES = ("a photo of a {}",)
"""What a class name is put into, where the encoder reads captions (`uses_templates`)."""


@dataclass(frozen=True)
class ZeroShot:
    """What was measured.

    ranks: [n] the place of the right class among all, 0 is first.
    predicted: [n] the class that comes first.
    similarities: [n] cosine with the right class, and best_wrong [n] with the best of the others.
    """

    model: str
    sha256: str
    classes: int
    ranks: NDArray[np.int64]
    predicted: NDArray[np.int64]
    similarities: NDArray[np.float64]
    best_wrong: NDArray[np.float64]

    @property
    def n(self) -> int:
        """Images."""
        return len(self.ranks)

    def top(self, k: int) -> Interval:
        """How often the right class is among the first k, with its 95 % Wilson interval."""
        return wilson(int((self.ranks < k).sum()), self.n)

    def to_dict(self) -> dict[str, float | int]:
        """{"top1", "top5", "n"}; with fewer than five classes top5 is 1."""
        return {"top1": self.top(1).value, "top5": self.top(5).value, "n": self.n}


def zeroshot(
    latents: Sequence[str | Path],
    names: Sequence[str],
    labels: Sequence[int],
    model: Encoder | str | Path = "auto",
    *,
    templates: Sequence[str] = TEMPLATES,
    space: str | None = None,
    scaled: bool | None = None,
    batch_size: int = 16,
    device: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ZeroShot:
    """Classify latents among `names`, and compare with `labels`.

    Args:
        latents: paths as `files.read_latents` takes them; every image must be readable.
        names: one class name each.
        labels: for each image, in the order of the latents, the index of its class in `names`.
        model: an encoder, its name or path; "auto" is the best one of the latents' space here.
        templates: each has one "{}" for the name; a class is the mean over them. An encoder
            whose text side names things (nano) takes the bare names.
        space, scaled: what the files do not say themselves.
        progress: called with (images done, images).

    Raises:
        LatentsError: an unreadable image, or another number of images than of labels.
        ModelError: no such model, or fewer than two names.
        ValueError: a label that is no index of `names`, or a template without "{}".
    """
    for label in labels:
        if not 0 <= label < len(names):
            raise ValueError(f"labels must be 0 to {len(names) - 1} (the last name), got {label}")
    if len(names) < 2:
        raise ModelError(f"zero-shot classification needs at least two names, got {len(names)}")
    encoder: Encoder | None = None
    classes: Tensor | None = None
    ranks, predicted, own, wrong, done = [], [], [], [], 0
    for batch in batches(latents, space, scaled, batch_size):
        if encoder is None:
            encoder = encoder_for(model, batch.space.name, device)
            classes = class_embeddings(encoder, names, templates)
        assert classes is not None
        right = np.asarray(labels[done : done + len(batch)])
        done += len(batch)
        if done > len(labels):
            raise LatentsError(f"more latents than labels: {len(labels)} labels")
        with torch.inference_mode():
            similarity = (encoder.encode_latents(batch).float() @ classes.T).cpu().double().numpy()
        if not np.isfinite(similarity).all():
            raise ModelError(f"model {encoder.name} gave similarities that are not finite")
        ranks.append(ranks_of(similarity, right))
        predicted.append(similarity.argmax(1))  # of equals the first, as `ranks_of` has it
        own.append(similarity[np.arange(len(right)), right])
        similarity[np.arange(len(right)), right] = -np.inf
        wrong.append(similarity.max(1))
        progress(done, len(labels))
    if done != len(labels):
        raise LatentsError(f"{done} latents, but {len(labels)} labels")
    assert encoder is not None
    return ZeroShot(
        encoder.name,
        encoder.sha256,
        len(names),
        np.concatenate(ranks),
        np.concatenate(predicted),
        np.concatenate(own),
        np.concatenate(wrong),
    )


@torch.inference_mode()
def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Unit-norm embeddings [C, dim] float32: the normalized mean over the templates."""
    check_templates(templates)
    if not encoder.uses_templates:
        return encoder.encode_text(names).float()
    parts = []
    for template in templates:
        parts.append(encoder.encode_text([template.replace("{}", name) for name in names]).float())
    return F.normalize(torch.stack(parts).mean(0), dim=-1)


def encoder_for(model: Encoder | str | Path, space: str, device: str | None = None) -> Encoder:
    """An encoder, by name or path, for latents of a space; "auto" is the best one that is here.

    Raises ModelError as `load_encoder` does.
    """
    if isinstance(model, Encoder):
        return model if device is None else model.to(device)
    name = best_encoder(space) if model == "auto" else model
    return load_encoder(name, device, space if needs_space(name) else None)
