"""Scorer: a policy bound to an encoder. This is the one place where latents become scores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentguard import ops
from latentguard.concepts import ConceptBank
from latentguard.encoders import (
    Encoder,
    Features,
    best_encoder,
    load_encoder,
    needs_space,
    strongest_view,
    traits,
)
from latentguard.encoders.crops import Crops
from latentguard.encoders.examples import widened
from latentguard.errors import LatentsError, ModelError, PolicyError
from latentguard.judge import (
    BoundRules,
    CascadeJudge,
    Heatmaps,
    Judge,
    Judged,
    ModelId,
    Rules,
    Verdict,
    decide,
)
from latentguard.judge.numbers import LARGEST
from latentguard.policy import Policy, load_policy
from latentguard.spaces import Latents, LatentSpace, Prediction
from latentguard.spaces.prediction import clean, pick
from latentguard.spaces.space import at_least_single

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


_BOUND = ("encoder", "bank", "bound", "first", "thorough", "_features", "_judge", "_final")
"""What a Scorer has once its space is known."""
_BINDING = threading.RLock()


@dataclass(frozen=True)
class Scores:
    """The scores of one batch.

    probability, margin: [B, K] float32, one column for each concept of the policy.
    best_prompt: [B, K] int64, an index into the bank's prompts.
    noise_level: noise-to-signal ratio of the latents.
    """

    probability: Tensor
    margin: Tensor
    best_prompt: Tensor
    noise_level: float


class Scorer:
    """Scores and verdicts of latents under one policy.

    Args:
        policy: a Policy, the name of a shipped one, or a path.
        model: an Encoder, its name or path, or "auto": the policy's own `model`, else the best
            encoder of `space` that is on this machine, else the bundled one.
        space: the latent space. With "auto", and with a model of several spaces (`nano-view`), it
            may be left out. If the policy does not name it either, the model is loaded with the
            first latents, for their space.
        device: where the encoder runs; None is CUDA if there is one, else the CPU.

    Raises:
        PolicyError: the policy cannot be used.
        ModelError: no such model, or a model of another space than the policy or `space` name.
        CoverageError (both of them): the model cannot see all of the policy's prompts.
    """

    def __init__(
        self,
        policy: Policy | str | Path = "default",
        model: Encoder | str | Path = "auto",
        *,
        space: LatentSpace | str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.policy = load_policy(policy)
        self.rules = Rules.of(self.policy.to_dict())
        """The policy as the judge reads it."""
        if model == "auto" and self.policy.model is not None:
            model = self.policy.model
        self._model, self._device = model, device
        wanted = self.policy.space if space is None else LatentSpace.of(space).name
        if wanted is not None or isinstance(model, Encoder) or not needs_space(model):
            self._bind(wanted)

    def _bind(self, space: str | None) -> None:
        """Load the encoder, and embed the policy's prompts with it."""
        self.encoder = _encoder(self._model, self._device, space)
        if space is not None and self.encoder.space != space:
            raise ModelError(
                f"model {self.encoder.name} reads {self.encoder.space} latents, not {space}"
            )
        if self.policy.space not in (None, self.encoder.space):
            raise ModelError(
                f"policy '{self.policy.name}' is written for {self.policy.space} latents, model "
                f"{self.encoder.name} reads {self.encoder.space}"
            )
        if any(concept.examples for concept in self.policy.concepts):
            # Crops and all else lie around it.
            self.encoder = widened(self.encoder)
        with self._exactly():
            self.bank = ConceptBank.build(self.policy, self.encoder)
        self.bound = self._bound()
        """The policy's rules for this model's scores."""
        self._features: Callable[..., Features] = self.encoder.features
        self.first: Scorer | None = None
        """Of the first model of the policy's `cascade`."""
        self.thorough: Scorer = self
        """What judges final latents: this one, or where the policy says `views: crops` another that
        reads crops besides."""
        if self.policy.cascade is not None:
            alone = self.policy.model_copy(update={"cascade": None, "views": "whole"})
            name, device = self.policy.cascade.first, self.encoder.device
            first = load_encoder(name, device, self.encoder.space if needs_space(name) else None)
            self.first = Scorer(alone, first)
        self._judge = final = self._judging(self)
        if self.policy.views == "crops" and not traits(self.encoder).reads_crops:
            self.thorough = self._over(Crops(self.encoder))
            final = self.thorough._judge
        self._final = final  # the last one: from now on `space` is known, in all threads

    def _over(self, encoder: Encoder) -> Scorer:
        """The same over an encoder with the same text side."""
        other = copy(self)
        other.encoder, other._features, other.thorough = encoder, encoder.features, other
        other.bound = other._bound()
        # The first model of a cascade reads images whole: what it allows was not seen in crops.
        in_crops = self.first is not None and traits(self.first.encoder).reads_crops
        other._judge = other._final = other._judging(other) if in_crops else _Alone(other)
        return other

    def _judging(self, scorer: Scorer) -> Judge[Latents | Prediction]:
        """A scorer as a judge, behind the first one of the policy's cascade."""
        if self.policy.cascade is None or self.first is None:
            return _Alone(scorer)
        unsure = self.policy.cascade.unsure
        return CascadeJudge(_Alone(self.first), _Alone(scorer), unsure, pick)

    def __getattr__(self, name: str) -> Any:
        if name in _BOUND:
            raise ModelError(
                f"model {str(self._model)!r} depends on the latents' space, which is not known "
                f"before the first latents: to use {name.lstrip('_')} now, give space=... or name "
                "the model"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def space(self) -> str | None:
        """The latent space that it reads; None before the first latents have determined it."""
        return self.encoder.space if "_final" in vars(self) else None

    def compile(self, mode: str = "default") -> None:
        """Compile the encoder with torch.compile.

        `mode` is that of torch.compile ("reduce-overhead" records CUDA graphs). The first batch of
        each shape takes the time to compile.
        """
        self._features = torch.compile(self.encoder.features, mode=mode)
        if self.thorough is not self:
            self.thorough.compile(mode)

    def score(self, latents: Latents | Prediction, noise_level: float = 0.0) -> Scores:
        """Scores of a batch, or of the clean estimates of a prediction; differentiable in the
        tensors.

        Raises LatentsError when the latents are of another space than the encoder's.
        """
        return self._scores(latents, self._seen(latents), noise_level)

    @torch.no_grad()
    def verdicts(
        self, latents: Latents | Prediction, noise_level: float = 0.0, final: bool = True
    ) -> list[Verdict]:
        """One verdict for each image. An image that cannot be judged gets the policy's `on_error`.

        Takes the same arguments as `judge`, and returns only its verdicts.
        """
        return list(self.judge(latents, noise_level, final).verdicts)

    @torch.no_grad()
    def judge(
        self,
        latents: Latents | Prediction,
        noise_level: float = 0.0,
        final: bool = True,
        heatmaps: bool = False,
    ) -> Judged:
        """Verdicts and, if asked for, heat maps from the same pass through the encoder.

        With a `cascade` in the policy its first model judges, and this one judges the images of
        which the first is not sure. With `views: crops` final latents are also read in crops.
        `noise_level` is the noise-to-signal ratio (0 is clean). `final` says that no further step
        follows. Raises LatentsError if the latents are of another space than the encoder's, and if
        final packed latents have another size than they say (`Latents.check_size`).
        """
        self._know(latents)
        if final and isinstance(latents, Latents):
            latents.check_size()
        judge = self._final if final else self._judge
        return judge.judge(latents, noise_level, final, heatmaps)

    def decide(self, scores: Scores, final: bool = True) -> list[Verdict]:
        """The policy's verdicts on scores of this model."""
        return decide(
            scores.probability.cpu().numpy(),
            scores.margin.cpu().numpy(),
            scores.best_prompt.cpu().numpy(),
            self.bound,
            scores.noise_level,
            final,
        )

    @torch.no_grad()
    def heatmaps(self, latents: Latents) -> NDArray[np.float32]:
        """Margins over the encoder's grid, [B, K, h, w] float32: where each concept is.

        Each cell is scored as if it were the image, so values compare with margins. Raises
        LatentsError if the encoder reads the image in tiles.
        """
        return self._heatmaps(self._seen(latents))

    def _bound(self) -> BoundRules:
        encoder, rules = self.encoder, self.rules
        model = ModelId(encoder.name, encoder.sha256)
        try:
            return rules.bind(model, encoder.space, encoder.logit_scale, seen=self.bank.seen)
        except ValueError as error:
            raise PolicyError(f"policy '{rules.policy.name}': {error}") from error

    def _know(self, latents: Latents | Prediction) -> None:
        name = _space(latents).name
        if self.space is not None:
            return
        with _BINDING:
            self._bind_once(name)

    def _bind_once(self, space: str) -> None:
        """Bind, unless another thread has meanwhile. Where it fails nothing is left of it."""
        if self.space is not None:
            return
        try:
            self._bind(space)
        except BaseException:
            for attribute in _BOUND:
                vars(self).pop(attribute, None)
            raise

    def _seen(self, latents: Latents | Prediction) -> Features:
        """Tokens and all: without them a matrix product of another size rounds otherwise, and a
        verdict would depend on whether a heat map is asked for."""
        self._know(latents)
        with self._exactly():
            return self._features(*self._input(latents))

    def _scores(
        self, latents: Latents | Prediction, features: Features, noise_level: float
    ) -> Scores:
        """Scores from features of these latents; NaN for images that cannot be judged."""
        with self._exactly():
            probability, margin, best = ops.concept_similarity(
                features.pooled.contiguous(),
                *self._head(),
                *self._bank(),
                self.encoder.logit_scale,
            )
        scores = probability, margin, best
        scale = self.encoder.logit_scale
        probability, margin, best = strongest_view(features.tiles, *scores, features.lead, scale)
        good = _usable(latents).to(margin.device)[:, None]
        probability, margin = (torch.where(good, x, torch.nan) for x in (probability, margin))
        return Scores(probability, margin, best, noise_level)

    def _heatmaps(self, features: Features) -> NDArray[np.float32]:
        if len(features.tokens) != len(features.pooled) and not features.lead:
            raise LatentsError("heat maps need an encoder that reads an image in one view")
        with self._exactly():
            margin = ops.concept_heatmap(features.tokens.contiguous(), *self._head(), *self._bank())
        found: NDArray[np.float32] = (
            margin.reshape(*margin.shape[:2], *features.grid).float().cpu().numpy()
        )
        return found

    def _exactly(self) -> torch.autocast:
        """Scores do not depend on whether a caller is in autocast."""
        return torch.autocast(self.encoder.device.type, enabled=False)

    def _input(self, latents: Latents | Prediction) -> tuple[Tensor | None, ...]:
        """The arguments of `Encoder.features`.

        Everything up to the encoder's input is computed in float32 and rounded once. An encoder
        that does this on the way gets the tensors as they are, where its dtype holds them.
        """
        encoder, space = self.encoder, _space(latents)
        if space.name != encoder.space:
            raise LatentsError(f"model {encoder.name} reads {encoder.space} latents, got {space}")
        if traits(encoder).unscales:
            noisy = latents.latents if isinstance(latents, Prediction) else latents.to_spatial()
            kept = torch.promote_types(noisy.tensor.dtype, encoder.dtype) == encoder.dtype
            needs = encoder.needs_scaled
            affine = noisy.affine(needs)
            if kept and (affine is not None or noisy.is_standard(needs)):
                return self._parts(latents, noisy, affine)
        converted = clean(latents).to_spatial().to_standard(encoder.needs_scaled)
        return (converted.tensor.to(encoder.device, encoder.dtype),)

    def _parts(
        self,
        latents: Latents | Prediction,
        noisy: Latents,
        affine: tuple[tuple[float, ...], tuple[float, ...]] | None,
    ) -> tuple[Tensor | None, ...]:
        encoder = self.encoder
        scale, shift = (None, None) if affine is None else map(self._vector, affine)
        where: Any = {"device": encoder.device, "dtype": encoder.dtype}
        x = noisy.tensor.to(**where)
        if not isinstance(latents, Prediction):
            return x, None, None, None, scale, shift
        levels = (self._vector([value] * len(latents)) for value in (latents.alpha, latents.sigma))
        return x, latents.noise.to(**where), *levels, scale, shift

    def _vector(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=self.encoder.device)

    def _head(self) -> tuple[Tensor | None, Tensor | None, float, Tensor | None]:
        head = self.encoder.head
        return head.ln_weight, head.ln_bias, head.eps, head.projection

    def _bank(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bank = self.bank
        return bank.embeddings, bank.segments, bank.contrast, bank.contrast_segments


@dataclass(frozen=True)
class _Alone:
    """A scorer without its cascade, as a judge."""

    scorer: Scorer

    @property
    def bound(self) -> BoundRules:
        return self.scorer.bound

    def judge(
        self,
        latents: Latents | Prediction,
        noise_level: float = 0.0,
        final: bool = True,
        heatmaps: bool = False,
    ) -> Judged:
        features = self.scorer._seen(latents)
        verdicts = self.scorer.decide(self.scorer._scores(latents, features, noise_level), final)
        return Judged(verdicts, self._maps(features) if heatmaps else None)

    def _maps(self, features: Features) -> Heatmaps:
        try:
            return Heatmaps(self.scorer._heatmaps(features))
        except Exception as error:  # they are an addition: the verdicts stand without them
            return Heatmaps.failed(error)


def _usable(latents: Latents | Prediction) -> Tensor:
    """Which images have finite numbers of at most `judge.numbers.LARGEST`, [B].

    Of a prediction, the largest number that its x0 can have counts. Nothing waits for the device.
    """
    if isinstance(latents, Prediction):
        noise = latents.sigma * _largest(latents.noise)
        return (_largest(latents.latents.tensor) + noise) / latents.alpha <= LARGEST
    return _largest(latents.tensor) <= LARGEST


def _largest(tensor: Tensor) -> Tensor:
    """The largest magnitude in each image, NaN if one of its numbers is, [B] float32 or float64."""
    return at_least_single(tensor.detach().abs().flatten(1).amax(1))


def _space(latents: Latents | Prediction) -> LatentSpace:
    """Raises LatentsError for what is neither of them."""
    found = latents.latents if isinstance(latents, Prediction) else latents
    if isinstance(found, Latents):
        return found.space
    raise LatentsError(
        "latents must say of which space they are: give Latents(tensor, space, scaled), got "
        f"{type(latents).__name__}"
    )


def _is_at(model: Encoder, device: torch.device | str) -> bool:
    wanted = torch.device(device)
    same = wanted.type == model.device.type
    return same and wanted.index in (None, model.device.index)


def _encoder(
    model: Encoder | str | Path, device: torch.device | str | None, space: str | None
) -> Encoder:
    if isinstance(model, Encoder):
        # A copy goes elsewhere: other scorers may use this one where it is.
        return model if device is None or _is_at(model, device) else deepcopy(model).to(device)
    if model == "auto":
        assert space is not None
        model = best_encoder(space)
    return load_encoder(model, device, space if needs_space(model) else None)
