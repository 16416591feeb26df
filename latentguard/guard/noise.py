"""Steering models of one or a few steps: the initial noise is optimized against a latent reward.

The procedure and its constants are ReNO's (Eyring et al., arXiv 2406.04312), with rewards that read
latents, as Latent-CLIP's paper does (arXiv 2503.08455): gradient ascent on the noise through the
whole pipeline, with the noise kept at its expected norm, and the best iterate returned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentguard.encoders import Encoder
from latentguard.errors import LatentsError
from latentguard.guard.attachment import guards_of, holds_guard
from latentguard.guard.forms import SPATIAL, patches
from latentguard.guard.layout import Layout, layout_of, pixels_in, space_of
from latentguard.guard.output import images_of
from latentguard.judge import Verdict
from latentguard.policy import Policy
from latentguard.scorer import Scorer
from latentguard.spaces import Latents, LatentSpace

Reward = Callable[[Latents], Tensor]
"""From clean latents [B, ...] to one number an image [B], differentiable; larger is better."""

REGULARIZATION = 0.01
CLIP = 0.1
LEARNING_RATE = 5.0
MOMENTUM = 0.9


@dataclass(frozen=True)
class OptimizedNoise:
    """The result of `optimize_noise`.

    noise: in the form of the pipeline's argument `latents`. With the same seed it gives `latents`.
    latents: the clean latents that it leads to, and `verdicts` on them. Without a policy there are
        no verdicts.
    first: the clean latents of the initial noise.
    reward: [B], of the best iterate. rewards: [iterations + 1, B], of all iterates, that of the
        initial noise first. seed: of the pipeline's generator in each iteration.
    """

    noise: Tensor
    latents: Latents
    verdicts: list[Verdict]
    reward: Tensor
    rewards: Tensor
    seed: int
    first: Latents


class Safety:
    """The policy as a reward: minus the amount by which the concepts' margins exceed their
    thresholds.

    This is multiplied by the encoder's logit scale, and is 0 if nothing matches. Concepts that only
    observe or ask for review are left out. slack: how far margins have to stay below.
    """

    def __init__(self, scorer: Scorer, slack: float = 0.02) -> None:
        self._scorer = scorer
        concepts = scorer.rules.concepts
        acting = ("block", "steer")
        self._columns = [k for k, rule in enumerate(concepts) if rule.action in acting]
        thresholds = [scorer.bound.threshold(k) for k in self._columns]
        self._thresholds = torch.tensor(thresholds, device=scorer.encoder.device) - slack

    def __call__(self, latents: Latents) -> Tensor:
        margin = self._scorer.score(latents).margin[:, self._columns]
        excess = torch.relu(margin - self._thresholds).sum(1)
        return -self._scorer.encoder.logit_scale * excess


class Agreement:
    """Agreement with a text as a reward: logit scale times the cosine of image and text."""

    def __init__(self, encoder: Encoder, text: str, weight: float = 1.0) -> None:
        self._encoder = encoder
        self._text = encoder.encode_text([text])[0]
        self._weight = weight

    def __call__(self, latents: Latents) -> Tensor:
        embedded = self._encoder.encode_latents(latents)
        return self._weight * self._encoder.logit_scale * (embedded @ self._text)


def optimize_noise(
    pipe: Any,
    prompt: str | list[str] | None,
    policy: Policy | str | Path | None = "default",
    reward: Reward | None = None,
    *,
    model: Encoder | str | Path = "auto",
    agreement: float = 0.0,
    iterations: int = 50,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    noise: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    space: LatentSpace | str | None = None,
    **call: Any,
) -> OptimizedNoise:
    """Search for an initial noise whose image the policy allows and the reward favors.

    This is meant for models of one to four steps (SDXL-Turbo: num_inference_steps=1,
    guidance_scale=0.0). Each iteration runs the pipeline once, with gradients.

    Args:
        pipe: a pipeline that takes `latents` and gives `output_type="latent"`.
        prompt: as the pipeline takes it. With prompt embeddings in `call` it is not given to the
            pipeline, and may be None; `agreement` still reads it.
        policy: concepts that block or steer give a negative reward while they match. None leaves
            the policy out, and with it every verdict; `reward` is required then.
        reward: a function of your own, added to the policy's reward.
        agreement: weight of a positive reward for the image's agreement with its prompt, which must
            be a single text.
        iterations: the most; it stops earlier if nothing matches and there is no positive reward.
        learning_rate: of SGD with Nesterov momentum 0.9. Before that, each image's gradient is
            clipped to an L2 norm of 0.1.
        seed: of the generator given to the pipeline in each iteration, and of the first noise.
        noise: the noise to begin with, in the form of the pipeline's `latents`.
        height, width: of the image in pixels; the pipeline's own size by default.
        call: further arguments of the pipeline.

    Raises:
        LatentsError: a guard is attached to the pipeline or given in `call`; the pipeline's space
            is unknown; the pipeline cannot be run with gradients; or there is neither a policy nor
            a reward.
        ValueError: iterations below 0.
        ModelError, PolicyError: as `Scorer` does.
    """
    if iterations < 0:
        raise ValueError(f"iterations must be at or above 0, got {iterations}")
    _check_unguarded(pipe, call)
    found = space_of(pipe, space)
    layout = layout_of(pipe, found)
    scorer = None
    if policy is not None:
        scorer = Scorer(policy, model, space=found, device=pipe._execution_device)
    rewards: list[Reward] = [] if scorer is None else [Safety(scorer)]
    if reward is not None:
        rewards.append(reward)
    if agreement:
        rewards.append(_agreement(scorer, prompt, agreement))
    if not rewards:
        raise LatentsError("there is nothing to search for: give a policy, a reward, or both")
    size = _size(pipe, height, width)
    if noise is None:
        noise = _noise(pipe, layout, size, _count(prompt, call), seed)
    given = None if call.get("prompt_embeds") is not None else prompt
    arguments = {**call, "prompt": given, "height": size[0], "width": size[1]}
    generate = _Generate(pipe, layout, arguments, seed)
    with _frozen(pipe), torch.inference_mode(False), torch.enable_grad():
        return _ascend(generate, scorer, rewards, noise, iterations, learning_rate, seed)


def _agreement(scorer: Scorer | None, prompt: str | list[str] | None, weight: float) -> Agreement:
    if not isinstance(prompt, str):
        raise LatentsError("agreement needs one prompt, given as text")
    if scorer is None:
        raise LatentsError(
            "agreement is measured with the policy's model: give a policy, or "
            "reward=Agreement(encoder, prompt)"
        )
    return Agreement(scorer.encoder, prompt, weight)


def _check_unguarded(pipe: Any, call: Mapping[str, Any]) -> None:
    """No guard that would be gone past: rewards and callbacks see latents before any is judged."""
    if guards_of(pipe) or holds_guard(list(call.values())):
        name = type(pipe).__name__
        raise LatentsError(
            f"this {name} has a guard, and optimize_noise would run past it: search with a "
            f"pipeline of the same parts that has none, {name}(**pipe.components), and give the "
            "noise that is found to the guarded one"
        )


def _ascend(
    generate: _Generate,
    scorer: Scorer | None,
    rewards: list[Reward],
    noise: Tensor,
    iterations: int,
    learning_rate: float,
    seed: int,
) -> OptimizedNoise:
    current = noise.detach().clone().float().requires_grad_(True)
    optimizer = torch.optim.SGD([current], learning_rate, MOMENTUM, nesterov=True)
    best = torch.full((len(current),), -torch.inf, device=current.device)
    best_noise = current.detach().clone()
    history = []
    # A policy is satisfied once nothing matches; a reward of another kind never is.
    bounded = all(isinstance(reward, Safety) for reward in rewards)
    with generate.pipe.progress_bar(total=iterations) as bar, generate.quiet():
        for iteration in range(iterations + 1):
            latents = generate(current.to(noise.dtype))
            if iteration == 0:
                first = _detached(latents)
            value = torch.stack([reward(latents).float() for reward in rewards]).sum(0)
            history.append(value.detach())
            # A reward that is not a number is never the best.
            better = value.detach() > best
            best = torch.where(better, value.detach(), best)
            best_noise[better] = current.detach()[better]
            satisfied = bounded and bool((best >= 0).all())
            if iteration == iterations or satisfied:
                break
            optimizer.zero_grad()
            loss = -(value - REGULARIZATION * _norm_penalty(current)).sum()
            (gradient,) = torch.autograd.grad(loss, current)
            if not torch.isfinite(gradient).all():
                raise LatentsError(
                    f"{type(generate.pipe).__name__} gives no finite gradient from latents to noise"
                )
            current.grad = _clipped(gradient)
            optimizer.step()
            bar.update()
        with torch.no_grad():
            final = generate(best_noise.to(noise.dtype))
    verdicts = [] if scorer is None else scorer.verdicts(final)
    return OptimizedNoise(
        best_noise.to(noise.dtype), final, verdicts, best, torch.stack(history), seed, first
    )


def _detached(latents: Latents) -> Latents:
    """A copy that keeps no graph alive."""
    return Latents(
        latents.tensor.detach().clone(),
        latents.space,
        latents.scaled,
        latents.layout,
        latents.height,
        latents.width,
        latents.ids,
    )


class _Generate:
    """The pipeline from noise to clean latents, with gradients."""

    def __init__(self, pipe: Any, layout: Layout, arguments: Mapping[str, Any], seed: int) -> None:
        self.pipe = pipe
        self._layout = layout
        self._arguments = dict(arguments)
        self._seed = seed
        # diffusers decorates __call__ with no_grad, and the guard wraps it: what is inside both.
        self._call = inspect.unwrap(type(pipe).__call__)

    def __call__(self, noise: Tensor) -> Latents:
        generator = torch.Generator(noise.device).manual_seed(self._seed)
        arguments = {**self._arguments, "latents": noise, "generator": generator}
        known = inspect.signature(self._call).parameters
        arguments = {
            name: value
            for name, value in arguments.items()
            if name in known or name not in ("height", "width")
        }
        output = self._call(self.pipe, output_type="latent", return_dict=False, **arguments)
        tensor = images_of(output)
        if not isinstance(tensor, Tensor) or (torch.is_grad_enabled() and not tensor.requires_grad):
            raise LatentsError(
                f"{type(self.pipe).__name__} gives no latents with a gradient back to its noise"
            )
        return self._layout.read(tensor, pixels_in(self._arguments))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Without the progress bars of the single runs."""
        before = getattr(self.pipe, "_progress_bar_config", {})
        self.pipe.set_progress_bar_config(**{**before, "disable": True})
        try:
            yield
        finally:
            self.pipe.set_progress_bar_config(**before)


@contextmanager
def _frozen(pipe: Any) -> Iterator[None]:
    """The gradient is with respect to the noise alone."""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    if height is not None and width is not None:
        return height, width
    cells = getattr(pipe, "default_sample_size", None)
    if not isinstance(cells, int):
        raise LatentsError(f"{type(pipe).__name__} has no size of its own: give height and width")
    side = cells * int(pipe.vae_scale_factor)
    return height or side, width or side


def _count(prompt: str | list[str] | None, call: Mapping[str, Any]) -> int:
    """How many images a call makes."""
    prompts = call.get("prompt_embeds")
    if prompts is None:
        prompts = prompt if isinstance(prompt, list) else [prompt]
    return len(prompts) * int(call.get("num_images_per_prompt") or 1)


def _noise(pipe: Any, layout: Layout, size: tuple[int, int], count: int, seed: int) -> Tensor:
    """Noise in the form that the pipeline's `latents` takes.

    It is drawn on the CPU, so that every machine draws the same, and in the denoiser's dtype, so
    that a pipeline of spatial latents draws the same of a generator with this seed.
    """
    device = pipe._execution_device
    space, form = layout.space, layout.forms[0]
    height, width = (side // space.vae_scale_factor // form.patch * form.patch for side in size)
    generator = torch.Generator().manual_seed(seed)
    shape = (count, space.channels, height, width)
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    noise = torch.randn(shape, generator=generator, dtype=denoiser.dtype).to(device)
    if form != SPATIAL and hasattr(type(pipe), "_unpack_latents_with_ids"):
        form = patches(form.patch)  # FLUX.2's pipelines take a grid, and pack it themselves
    return form.restored(noise)


def _norm_penalty(noise: Tensor) -> Tensor:
    """Minus the log density of the norm r of d standard normal numbers, up to a constant, [B]."""
    r = noise.flatten(1).norm(dim=1)
    dimensions = noise[0].numel()
    penalty: Tensor = 0.5 * r.square() - (dimensions - 1) * r.log()
    return penalty


def _clipped(gradient: Tensor) -> Tensor:
    """Each image's gradient with an L2 norm of at most `CLIP`."""
    norm = gradient.flatten(1).norm(dim=1).reshape(-1, *[1] * (gradient.ndim - 1))
    clipped: Tensor = gradient * (CLIP / norm.clamp_min(CLIP))
    return clipped
