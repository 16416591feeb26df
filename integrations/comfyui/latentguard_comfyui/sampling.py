"""The guard in a sampler: two wrappers on a MODEL, and a session for each run of a sampler.

Each time the model predicts the clean latents, the session judges them, and what it gives back is
what the sampler goes on with: the same, steered, or zero. When the sampler has ended, what it gives
is judged as final. Both happen in the model's own convention (scaled).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from latentguard import GuardError, Latents
from latentguard.guard import Session, session

from .conventions import held_by, latents_of, tensor_like
from .loaded import Loaded
from .told import stop

KEY = "latentguard"


class AllBlockedError(Exception):
    """Leaves a sampler whose images are all blocked. Never seen outside of SamplerGuard."""

    def __init__(self, run: Run) -> None:
        super().__init__("every image is blocked")
        self.run = run


class SamplerGuard:
    """The wrappers of one patched model.

    on_block: "blank" gives zero latents for a blocked image, and ends the run where all are
    blocked; "stop" raises BlockedError as soon as one is.
    """

    def __init__(self, loaded: Loaded, on_block: str) -> None:
        self._loaded, self._on_block = loaded, on_block
        self._running: ContextVar[Run | None] = ContextVar("run", default=None)

    def patch(self, model: Any) -> Any:
        """A copy of a MODEL that is guarded. Raises LatentsError where its latents are not known,
        and ModelError or PolicyError where nothing reads them."""
        from comfy.patcher_extension import WrappersMP

        self._loaded.scorer(held_by(model.get_model_object("latent_format")).space)
        guarded = model.clone()
        guarded.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self.sample)
        guarded.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self.predict)
        return guarded

    def sample(
        self,
        executor: Callable[..., Tensor],
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Around a sampler: begins a run, and judges what comes out of it."""
        model = model_wrap.inner_model
        run = Run(self._loaded, self._on_block, model, sigmas, latent_image, denoise_mask)
        run.session.begin(len(noise))
        token = self._running.set(run)
        given = (model_wrap, sigmas, extra_args, callback, noise)
        try:
            samples = run.finish(executor(*given, latent_image, denoise_mask, disable_pbar))
        except AllBlockedError as ended:
            if ended.run is not run:
                raise
            samples = torch.zeros_like(noise)
        finally:
            self._running.reset(token)
        if run.session.blocked and callback is not None:
            # What shows previews, and what keeps the last prediction as another output, has those
            # of the steps before.
            steps = max(1, len(sigmas) - 1)
            callback(steps - 1, run.blanked(samples), samples, steps)
        return samples

    def predict(
        self,
        executor: Callable[..., Tensor],
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Around a prediction of the clean latents, after guidance."""
        denoised = executor(x, timestep, {} if model_options is None else model_options, seed)
        run = self._running.get()
        if run is None:
            raise GuardError(
                "a model with a LatentGuard was called outside of a sampler, where nothing is "
                "judged: use the model without the guard there"
            )
        return run.step(denoised, timestep)


class Run:
    """One run of a sampler.

    Args:
        model: the BaseModel that it denoises with.
        sigmas: [N + 1], as the sampler gets them.
        latent_image, mask: what an inpainting run keeps, and where it does not, or None.
    """

    def __init__(
        self,
        loaded: Loaded,
        on_block: str,
        model: Any,
        sigmas: Tensor,
        latent_image: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        self._held = held_by(model.latent_format)
        self._sampling = model.model_sampling
        self._stops = on_block == "stop"
        self._latent_image, self._mask = latent_image, mask
        self._clean = float(sigmas[-1]) == 0
        """Whether it ends without noise. Otherwise another sampler goes on with what it gives."""
        # Some samplers compute a sigma back from its logarithm.
        self._last = float(sigmas[-2]) * 1.0001 if self._clean and len(sigmas) > 1 else -1.0
        self._estimate: Latents | None = None
        self._level = 0.0
        self.session: Session = session(loaded.policy, loaded.scorer(self._held.space))

    def step(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        """Judge a prediction; what the sampler goes on with. Raises AllBlockedError."""
        latents = self._latents(self._composed(denoised))
        if float(sigma.max()) <= self._last:
            # Nothing comes after this one that could mend a steered image: it is what comes out.
            result = self.session.step(latents, noise_level=0.0, final=True)
        else:
            self._level = noise_level(self._sampling, sigma)
            # To a sampler a changed prediction is what a push on its latents is in latentguard's
            # other loops: the same way, times the share by which the noise falls at this step.
            result = self.session.step(
                latents, latents, noise_level=0.0, x0_noise_level=self._level
            )
        self._stop()
        if result.stop:
            raise AllBlockedError(self)
        self._estimate = result.latents
        if result.latents is latents:
            return denoised
        return tensor_like(result.latents, self._held, denoised)

    def finish(self, samples: Tensor) -> Tensor:
        """Judge what the sampler gives, or the last prediction where that is still noisy."""
        latents = self._latents(samples)
        if self._clean:
            given = self.session.step(latents, noise_level=0.0, final=True).latents
        else:
            if self._estimate is None:
                self.session.fail("the sampler ended without a prediction", final=True)
            else:
                self.session.step(self._estimate, noise_level=self._level, final=True)
            given = self.session.blanked(latents)
        self._stop()
        return samples if given is latents else tensor_like(given, self._held, samples)

    def blanked(self, like: Tensor) -> Tensor:
        """The last prediction without the images that are blocked; zero where there is none."""
        if self._estimate is None or self.session.stopped:
            return torch.zeros_like(like)
        return tensor_like(self.session.blanked(self._estimate), self._held, like)

    def _latents(self, tensor: Tensor) -> Latents:
        return latents_of(tensor.detach(), self._held, scaled=True)

    def _composed(self, denoised: Tensor) -> Tensor:
        """What an inpainting run makes of a prediction."""
        if self._mask is None or self._latent_image is None:
            return denoised
        return denoised * self._mask + self._latent_image * (1 - self._mask)

    def _stop(self) -> None:
        if self._stops:
            stop(self.session.verdicts, self.session.blocked)


def noise_level(sampling: Any, sigma: Tensor) -> float:
    """The noise-to-signal ratio at a sigma, by the model's `noise_scaling`; inf without signal."""
    at = sigma.detach().max().reshape(1)
    one, zero = torch.ones_like(at), torch.zeros_like(at)
    noise = float(sampling.noise_scaling(at, one.clone(), zero.clone()))
    signal = float(sampling.noise_scaling(at, zero.clone(), one.clone()))
    return noise / signal if signal > 0 else float("inf")
