"""The finite set: latents with a class each, prompts for it, and which photo a latent became."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentguard.errors import LatentsError
from latentguard.spaces import Latents


@dataclass(frozen=True)
class Outcome:
    """Which photo each of B latents became.

    index: [B] int64, the nearest photo of the set.
    labels: its class, B of them.
    distance: [B] float32, L2 distance to it, divided by the median distance between two photos:
        0 is the photo itself, 1 as far away as another photo.
    """

    index: Tensor
    labels: tuple[str, ...]
    distance: Tensor


class Photos:
    """Latents of one size and space, and a class for each.

    Attributes:
        tensor: [N, C, H, W] float, as the model denoises them (scaled).
        labels: N class names.
        classes: the K different ones, sorted; a prompt is a vector of weights over them.
        typical: the median L2 distance between two photos (of up to 512 of them).

    Args:
        latents: scaled latents, at least two; float32 unless float64 is given.
        labels: a class name for each; None takes what stands before the first "/" of the ids.

    Raises:
        LatentsError: fewer than two photos, raw latents, or another number of labels.
    """

    def __init__(self, latents: Latents, labels: Sequence[str] | None = None) -> None:
        if not latents.scaled:
            raise LatentsError("the set must hold scaled latents: call .to_scaled() on them first")
        if len(latents) < 2:
            raise LatentsError("the set must hold at least two photos, got one")
        if labels is None:
            if latents.ids is None:
                raise LatentsError("the set needs a label for each photo: give labels or ids")
            labels = [name.split("/")[0] for name in latents.ids]
        if len(labels) != len(latents):
            raise LatentsError(f"{len(latents)} photos need as many labels, got {len(labels)}")
        self.latents = latents.to_spatial()
        self.space = latents.space
        tensor = self.latents.tensor.detach()
        self.tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        self.labels = tuple(labels)
        self.classes = tuple(sorted(set(labels)))
        index = {name: number for number, name in enumerate(self.classes)}
        self.label_index = torch.tensor([index[name] for name in self.labels])
        self.typical = _typical(self.tensor.flatten(1))

    def __len__(self) -> int:
        return len(self.labels)

    def embeds(self, prompts: Sequence[str | None], leak: float = 0.0) -> Tensor:
        """Class weights [B, 1, K] float32: 1 at the class that a prompt names, all 0 for None.

        All 0 is the unconditional prompt, under which every photo is equally likely. Sums such as
        0.7 of one class and 0.3 of another are prompts, too.
        leak: the share of the weight, 0 to 1, that is spread evenly over the whole set. Without
            it nothing but the class can come out, whatever x_t is moved to; with a little, the
            prompt decides early and what is in x_t late, as in a trained model.
        Raises LatentsError for a class that the set does not have.
        """
        if not 0 <= leak <= 1:
            raise LatentsError(f"leak must be 0 to 1, got {leak:g}")
        weights = torch.zeros(len(prompts), 1, len(self.classes))
        everywhere = torch.bincount(self.label_index) / len(self)
        for row, name in enumerate(prompts):
            if name is None:
                continue
            if name not in self.classes:
                raise LatentsError(
                    f"the set has no class {name!r}: use one of {', '.join(self.classes)}"
                )
            weights[row, 0] = leak * everywhere
            weights[row, 0, self.classes.index(name)] += 1 - leak
        return weights

    def outcome(self, latents: Tensor) -> Outcome:
        """The nearest photo of each latent [B, C, H, W] (scaled), and how far away it is.

        Raises LatentsError for latents of another size than the set's.
        """
        if latents.shape[1:] != self.tensor.shape[1:]:
            raise LatentsError(
                f"outcomes are of latents {['B', *self.tensor.shape[1:]]}, "
                f"got {list(latents.shape)}"
            )
        with torch.no_grad():
            flat = latents.detach().to(self.tensor).flatten(1)
            photos = self.tensor.flatten(1)
            # Differences, not inner products: the distance to the photo itself is to be exact.
            index = (photos.square().sum(1) / 2 - flat @ photos.T).argmin(1)
            distance = (flat - photos[index]).norm(dim=1) / self.typical
        labels = tuple(self.labels[i] for i in index.tolist())
        return Outcome(index.cpu(), labels, distance.float().cpu())


def _typical(flat: Tensor) -> float:
    some = flat[:: max(1, len(flat) // 512)].float()
    distances = torch.pdist(some)
    typical = float(distances.median())
    if typical <= 0:
        raise LatentsError("the set must hold different photos: more than half of them are equal")
    return typical
