"""What every encoder gives: features of latents, a head into the joint space, and text there.

Nothing here imports torch when the module is loaded: commands that only list models stay quick.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from latentguard.errors import LatentsError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from latentguard.spaces import Latents


@dataclass(frozen=True)
class Features:
    """What an encoder's trunk says of a batch of latents, before the head.

    pooled: [B, D], one vector an image (what the head turns into the image's embedding).
    tokens: [B, N, D], one vector a place, row-major over `grid`; the head applies to them too,
        which is what heat maps are made of. N is 0 where they were not asked for.
    grid: (rows, columns) with rows * columns == N.
    tiles: how many views of each image were read. Above 1, `pooled` is [B * tiles, D], an image's
        views next to each other, and its scores are those of `strongest_view`.
    lead: what is taken off the margins of all views but the first.
    """

    pooled: Tensor
    tokens: Tensor
    grid: tuple[int, int]
    tiles: int = 1
    lead: float = 0.0


def strongest_view(
    tiles: int,
    probability: Tensor,
    margin: Tensor,
    best_prompt: Tensor,
    lead: float = 0.0,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the scores of views [B * tiles, K] to those of images [B, K]: the largest margin wins.

    With a `lead`, the margins of all views but the first count less by it, and probabilities are
    those of the margins that are left, by the encoder's logit scale.

    A NaN in any view stays a NaN, so that whoever reads the score fails closed.
    """
    if tiles == 1:
        return probability, margin, best_prompt
    shape = (-1, tiles, margin.shape[-1])
    margins = margin.reshape(shape)
    if lead:
        import torch

        margins = torch.cat([margins[:, :1], margins[:, 1:] - lead], 1)
    best, view = margins.max(dim=1)
    pick = view.unsqueeze(1)
    chosen = probability.reshape(shape).gather(1, pick).squeeze(1)
    if lead:
        chosen = (logit_scale * best).sigmoid()
    return chosen, best, best_prompt.reshape(shape).gather(1, pick).squeeze(1)


@dataclass(frozen=True)
class Head:
    """The step from features [..., D] to the joint space [..., dim]: LayerNorm, then a projection.

    Each half is absent where the encoder has none: no `ln_weight` means no LayerNorm, no
    `projection` [D, dim] means dim == D. `ops.concept_similarity` applies it together with the
    similarity; `embed` is the same in plain PyTorch.
    """

    ln_weight: Tensor | None = None
    ln_bias: Tensor | None = None
    eps: float = 1e-5
    projection: Tensor | None = None

    def embed(self, features: Tensor) -> Tensor:
        """Unit-norm embeddings [..., dim] of features [..., D]; the norm is taken in float32."""
        import torch.nn.functional as F

        x = features
        if self.ln_weight is not None:
            x = F.layer_norm(x, x.shape[-1:], self.ln_weight, self.ln_bias, self.eps)
        if self.projection is not None:
            x = x @ self.projection
        return F.normalize(x.float(), dim=-1)


class EncoderBase:
    """What an encoder says of its own kind, so that nobody asks for its class.

    An encoder inherits this and overrides what is different. One that does not inherit it counts
    as one that overrides nothing (see `traits`).
    """

    fixed_size: bool = False
    """Whether it reads latents of different sizes in different ways: an export is of one size."""
    pools: bool = False
    """Whether `features` takes `tokens` as well, and without them computes what is pooled alone."""
    unscales: bool = False
    """Whether `features` takes `scale` and `shift` [C] as well, and reads latents * scale + shift.
    Its first operator applies them, and the x0 estimate, without a pass of its own."""
    crop_side: int | None = None
    """The side in latent cells of crops that it reads well (see `crops`); None where its crops were
    not measured. `crop_lead` is the margin that one has to have above what the whole needs."""
    crop_lead: float = 0.0
    reads_crops: bool = False
    """Whether it reads an image in crops already."""
    trunk_dim: int = 0
    """How many numbers the model knows of an image before its text space. `features(trunk=True)`
    puts them, with norm 1, behind the embedding; 0 where it has none, or the embedding is them."""
    text_norm: float = 1.0
    """The norm of what `encode_text` gives."""
    merges: bool = False
    """Whether a share of its tokens can merge (`NAME+merge=SHARE`)."""
    merge: float = 0.0
    """The share of its tokens that merge; 0 is the model as it was published."""

    @property
    def module(self) -> nn.Module | None:
        """What holds the weights as parameters; an encoder that is a module has itself here."""
        return None

    @property
    def variant(self) -> bool:
        """Whether it is another model than the published one. Its name says so, too."""
        return self.merge > 0

    def tokens_left(self, height: int, width: int) -> tuple[int, int]:
        """Patch tokens of latents of a size in cells, and how many are left in the last block.

        Raises ModelError where an encoder merges none.
        """
        raise ModelError(f"{type(self).__name__} merges no tokens")

    @contextmanager
    def published(self) -> Iterator[None]:
        """The model as it was published, for as long as the context lasts."""
        share, self.merge = self.merge, 0.0
        try:
            yield
        finally:
            self.merge = share


def clean_estimate(
    latents: Tensor, noise: Tensor | None, alpha: Tensor | None, sigma: Tensor | None
) -> Tensor:
    """The x0 prediction (latents - sigma * noise) / alpha, in float32; latents alone stay as they
    are. Raises as `check_prediction` does."""
    check_prediction(latents, noise, alpha, sigma)
    x = latents
    if noise is not None and sigma is not None:
        x = x.float() - sigma.float().view(-1, 1, 1, 1) * noise.float()
    if alpha is not None:
        x = x.float() / alpha.float().view(-1, 1, 1, 1)
    return x


def check_prediction(
    latents: Tensor, noise: Tensor | None, alpha: Tensor | None, sigma: Tensor | None
) -> None:
    """Raises LatentsError unless noise, alpha and sigma are given together, or alpha alone, in the
    sizes of the latents [B, ...]."""
    if (noise is None) is not (sigma is None) or (noise is not None and alpha is None):
        pairs = (("noise", noise), ("alpha", alpha), ("sigma", sigma))
        got = " and ".join(name for name, value in pairs if value is not None)
        raise LatentsError(
            f"a clean estimate needs noise, alpha and sigma together, or alpha alone, got {got}"
        )
    if noise is not None and noise.shape != latents.shape:
        raise LatentsError(
            f"the predicted noise must have the shape of the latents, {list(latents.shape)}, "
            f"got {list(noise.shape)}"
        )
    for name, level in (("alpha", alpha), ("sigma", sigma)):
        if level is not None and level.shape != latents.shape[:1]:
            raise LatentsError(
                f"{name} must be [{latents.shape[0]}], one for each image, got {list(level.shape)}"
            )


def traits(encoder: Encoder) -> EncoderBase:
    """What an encoder says of its own kind; the defaults where it says nothing."""
    return encoder if isinstance(encoder, EncoderBase) else EncoderBase()


@runtime_checkable
class Encoder(Protocol):
    """Turns latents and prompts into unit vectors of one space, whose inner product is the score.

    `EncoderBase` has what an encoder may add for exports.
    """

    @property
    def name(self) -> str:
        """The model's name, as in verdicts and lock files."""

    @property
    def sha256(self) -> str:
        """Hex digest of the weights; with `name` it keys calibrated thresholds."""

    @property
    def space(self) -> str:
        """The latent space that it reads, a key of `latentguard.spaces.SPACES`."""

    @property
    def needs_scaled(self) -> bool:
        """Whether `features` reads scaled latents (True) or raw ones (False)."""

    @property
    def dim(self) -> int:
        """Dimensions of the joint space."""

    @property
    def logit_scale(self) -> float:
        """The factor from margins to logits (already exponentiated)."""

    @property
    def head(self) -> Head:
        """From features to the joint space."""

    @property
    def neutral_prompts(self) -> tuple[str, ...]:
        """Contrast prompts for concepts of policies that give none."""

    @property
    def always_neutral(self) -> bool:
        """Whether the neutral prompts are added to every concept's contrast, or only to an empty
        one.
        """

    @property
    def uses_templates(self) -> bool:
        """Whether prompts are embedded inside the policy's templates, or bare."""

    @property
    def notes(self) -> str:
        """The model's card in a few sentences: what it is, and its limits. Reports show it."""

    @property
    def min_coverage(self) -> float:
        """The coverage below which a prompt counts as not visible to this encoder."""

    @property
    def device(self) -> torch.device:
        """Where the weights are; `features` takes latents there."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which `features` computes."""

    def features(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Features:
        """Features of latents [B, C, H, W], in the scaling that `needs_scaled` names.

        With the predicted `noise` (the shape of latents), `alpha` [B] and `sigma` [B] it reads the
        estimate of the clean latents, (latents - sigma * noise) / alpha. `alpha` alone divides.
        Differentiable in latents. Raises LatentsError if only some of them are given, and for sizes
        that do not fit together (see `check_prediction`).
        """

    def encode_latents(self, latents: Latents) -> Tensor:
        """Unit-norm float32 embeddings [B, dim]. Raises LatentsError for another space or shape."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm float32 embeddings [P, dim]."""

    def coverage(self, texts: Sequence[str]) -> Tensor:
        """How well this encoder can see each text [P], from 0 (not at all) to 1."""

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights to a device, in place; returns the encoder."""
