"""Clean estimates and noise levels from diffusers' schedulers.

A noisy latent is not an image, the model's prediction of its clean part (x0) is one. Latents are
x = alpha * x0 + sigma * noise, in the units that the pipeline carries: alpha is 1 where variance
explodes (Euler and its kin), sqrt(alphas_cumprod) where it is preserved (DDIM, DPM-Solver), and
1 - sigma in flow matching. All that is read here are attributes of the scheduler; an unknown
class is an error, never a guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentguard.deprecated import Former, former_keywords, former_names
from latentguard.errors import GuardError, LatentsError

# By what a scheduler's own step works with, looked up by class name along the MRO.
_EXPLODING = ("EulerDiscrete", "EulerAncestralDiscrete", "EDMEuler", "LMSDiscrete", "HeunDiscrete")
_MIDPOINT = ("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
_CONVERTING = (
    *("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver"),
    "EDMDPMSolverMultistep",
)
_STRIDING = ("DDIM", "DDIMParallel", "CogVideoXDDIM")
_TIMESTEPS = (*_STRIDING, "DDPM", "DDPMParallel", "PNDM", "LCM", "TCD")
_FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM")
_KNOWN = (*_EXPLODING, *_MIDPOINT, *_CONVERTING, *_TIMESTEPS, *_FLOW)

# Whose steps add noise of their own, so that two consecutive latents do not tell x0.
_STOCHASTIC = (
    *("EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "DPMSolverSDE", "SASolver"),
    *("DDPM", "DDPMParallel", "LCM", "TCD", "FlowMatchLCM"),
)

# The second thing that these return is the x0 prediction; TCD's is its noised sample.
_RETURNS_X0 = (
    *("EulerDiscrete", "EulerAncestralDiscrete", "EDMEuler", "LMSDiscrete", "HeunDiscrete"),
    *("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"),
    *(*_STRIDING, "DDPM", "DDPMParallel", "LCM"),
)


@dataclass(frozen=True)
class NoiseLevel:
    """How noisy latents are: x = alpha * x0 + sigma * noise."""

    alpha: float
    sigma: float

    @property
    def noise_level(self) -> float:
        """The noise-to-signal ratio sigma / alpha: 0 is clean, inf is pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf


CLEAN = NoiseLevel(1.0, 0.0)

if not TYPE_CHECKING:
    __getattr__ = former_names(__name__, {"Level": "NoiseLevel"})


@dataclass(frozen=True)
class StepCall:
    """One call of `scheduler.step`.

    model_output, sample: [B, ...] as given (sample is x_t). result: what step returned, a tuple or
    an output object. level: `level_before(scheduler, timestep)`, taken before the call.
    """

    scheduler: Any
    model_output: Tensor
    timestep: Any
    sample: Tensor
    result: Any
    level: NoiseLevel


@dataclass(frozen=True)
class Parts:
    """x0 = (sample - sigma * noise) / alpha, before it is computed; sample and noise [B, ...]."""

    sample: Tensor
    noise: Tensor
    alpha: float
    sigma: float

    def x0(self) -> Tensor:
        """[B, ...], computed in float32."""
        return (self.sample.float() - self.sigma * self.noise.float()) / self.alpha


@former_keywords(source="level_before", latents="level_after", how="estimate_source")
@dataclass(frozen=True)
class Denoised:
    """What a step says of the clean latents.

    x0: [B, ...] the prediction, in the shape and dtype of the sample.
    level_before: of the sample that it was predicted from: thresholds go by it.
    level_after: of the latents after the step.
    estimate_source: "scheduler" where it is the scheduler's own, otherwise the algebra that gave
        it: "epsilon", "v_prediction", "sample", "flow_prediction"; "consecutive" where two latents
        did.
    parts: what x0 was made of, where it is (sample - sigma * noise) / alpha; else None.
    """

    x0: Tensor
    level_before: NoiseLevel
    level_after: NoiseLevel
    estimate_source: str
    parts: Parts | None = None

    source, latents = Former("level_before"), Former("level_after")
    how = Former("estimate_source")


def check_scheduler(scheduler: Any) -> None:
    """Raises GuardError for a scheduler whose noise levels are not known here."""
    try:
        _kind(scheduler)
    except LatentsError as error:
        raise GuardError(str(error)) from None


def level_before(scheduler: Any, timestep: Any) -> NoiseLevel:
    """The level of the sample that `step(..., timestep, sample)` is about to be given.

    Raises LatentsError for a scheduler that is not known.
    """
    kind = _kind(scheduler)
    if kind in _TIMESTEPS:
        return _preserving(float(scheduler.alphas_cumprod[int(timestep)]))
    index = scheduler.step_index
    if index is None:
        begin = scheduler.begin_index
        index = scheduler.index_for_timestep(timestep) if begin is None else begin
    return _at(scheduler, kind, int(index))


def denoised(call: StepCall) -> Denoised:
    """The clean estimate that a step was made with, and the levels before and after it.

    Raises LatentsError for a scheduler or prediction type that is not known, and where the level is
    pure noise and the prediction epsilon, which then says nothing of x0.
    """
    kind = _kind(call.scheduler)
    after = _after(call.scheduler, call.timestep, kind)
    if kind in _RETURNS_X0:
        own = getattr(call.result, "denoised", None) if kind == "LCM" else None
        if own is None:
            own = getattr(call.result, "pred_original_sample", None)
        if own is None and isinstance(call.result, tuple) and len(call.result) > 1:
            own = call.result[1]
        if isinstance(own, Tensor):
            return Denoised(own.to(call.sample.dtype), call.level, after, "scheduler")
    prediction = "flow_prediction"
    if kind not in _FLOW:
        prediction = str(call.scheduler.config.prediction_type)
    parts = _parts(call, kind, prediction)
    x0 = _algebra(call, kind, prediction) if parts is None else parts.x0()
    return Denoised(x0.to(call.sample.dtype), call.level, after, prediction, parts)


def is_last(call: StepCall) -> bool:
    """Whether the scheduler has no further step."""
    scheduler, kind = call.scheduler, _kind(call.scheduler)
    if kind in _TIMESTEPS:
        return _position(scheduler, call.timestep) >= len(scheduler.timesteps)
    return int(scheduler.step_index) >= len(scheduler.timesteps)


def denoised_unseen(scheduler: Any, timestep: Any, before: Tensor, after: Tensor) -> Denoised:
    """The clean estimate of a step of which only the latents before and after it are known.

    scheduler: in its state after the step; timestep: of the step. Exact for first-order solvers
    (see `from_consecutive`), a mean over the step for those of higher order. Raises LatentsError
    for schedulers that are not known or add noise, and where `step` left no trace in their state.
    """
    kind = _kind(scheduler)
    name = type(scheduler).__name__
    if _adds_noise(scheduler, kind):
        raise LatentsError(f"the step of the scheduler ({name}) was not seen, and it adds noise")
    if kind in _TIMESTEPS:
        source = _preserving(float(scheduler.alphas_cumprod[int(timestep)]))
    elif scheduler.step_index is None:
        raise LatentsError(f"the step of the scheduler ({name}) was not seen, and left no trace")
    else:
        source = _at(scheduler, kind, int(scheduler.step_index) - 1)
    level = _after(scheduler, timestep, kind)
    return Denoised(from_consecutive(before, after, source, level), source, level, "consecutive")


@former_keywords(source="level_before", latents="level_after")
def from_consecutive(
    before: Tensor, after: Tensor, level_before: NoiseLevel, level_after: NoiseLevel
) -> Tensor:
    """x0 from the latents before and after a deterministic first-order step, nothing else known.

    Both are made of the same x0 and noise at two levels, two equations for two unknowns:
    x0 = (sigma' x - sigma x') / (alpha sigma' - alpha' sigma). Exact for DDIM, Euler and flow
    matching's Euler. Raises LatentsError where the levels are the same.
    """
    determinant = level_before.alpha * level_after.sigma - level_after.alpha * level_before.sigma
    if abs(determinant) < 1e-12:
        raise LatentsError("two latents of the same noise level do not tell x0")
    x0 = (level_after.sigma * before.float() - level_before.sigma * after.float()) / determinant
    return x0.to(before.dtype)


# -- levels ------------------------------------------------------------------------------------


def _kind(scheduler: Any) -> str:
    for cls in type(scheduler).__mro__:
        name = cls.__name__.removesuffix("Scheduler")
        if name in _KNOWN:
            return name
    raise LatentsError(
        f"the noise levels of {type(scheduler).__name__} are not known: use one of "
        + ", ".join(_KNOWN)
    )


def _adds_noise(scheduler: Any, kind: str) -> bool:
    config = scheduler.config
    return (
        kind in _STOCHASTIC
        or bool(getattr(config, "stochastic_sampling", False))
        or str(getattr(config, "algorithm_type", "")).startswith("sde-")
    )


def _preserving(alpha_cumprod: float) -> NoiseLevel:
    return NoiseLevel(math.sqrt(alpha_cumprod), math.sqrt(max(0.0, 1 - alpha_cumprod)))


def _at(scheduler: Any, kind: str, index: int) -> NoiseLevel:
    """The level of the sample at a step index, in the state that the scheduler is in."""
    sigmas = scheduler.sigmas
    index = min(index, len(sigmas) - 1)
    sigma = float(sigmas[index])
    if kind in _FLOW:
        return NoiseLevel(1 - sigma, sigma)
    if kind in _CONVERTING:
        alpha, scaled = scheduler._sigma_to_alpha_sigma_t(torch.tensor(sigma, dtype=torch.float64))
        return NoiseLevel(float(alpha), float(scaled))
    if kind in _MIDPOINT and not scheduler.state_in_first_order:
        if kind == "DPMSolverSDE":
            sigma = float(scheduler.mid_point_sigma)
        else:
            back = 1 if kind == "KDPM2AncestralDiscrete" else 0
            sigma = float(scheduler.sigmas_interpol[index - back])
    return NoiseLevel(1.0, sigma)


def _after(scheduler: Any, timestep: Any, kind: str) -> NoiseLevel:
    """The level of the latents that the step at a timestep returned."""
    if kind not in _TIMESTEPS:
        return _at(scheduler, kind, int(scheduler.step_index))
    if kind in _STRIDING:
        # By a fixed stride, which may end above 0 or miss the next timestep by one.
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        before = int(timestep) - stride
        if before >= 0:
            return _preserving(float(scheduler.alphas_cumprod[before]))
        return _preserving(float(scheduler.final_alpha_cumprod))
    position = _position(scheduler, timestep)
    if position < len(scheduler.timesteps):
        return _preserving(float(scheduler.alphas_cumprod[int(scheduler.timesteps[position])]))
    if kind in ("LCM", "DDPM", "DDPMParallel"):
        return CLEAN
    if kind == "TCD":
        return _preserving(float(scheduler.alphas_cumprod[0]))
    return _preserving(float(scheduler.final_alpha_cumprod))


def _position(scheduler: Any, timestep: Any) -> int:
    """How many of the scheduler's timesteps are done, the one of this call included."""
    counter = getattr(scheduler, "counter", None)
    if counter is not None:  # PNDM repeats some
        # img2img begins within the schedule, and the counter does not know.
        return max(int(counter), int((scheduler.timesteps > int(timestep)).sum()) + 1)
    index = getattr(scheduler, "step_index", None)
    if index is not None:
        return int(index)
    found = (scheduler.timesteps == int(timestep)).nonzero()
    if len(found) == 0:
        raise LatentsError(
            f"timestep {int(timestep)} is none of the {type(scheduler).__name__}'s timesteps"
        )
    return int(found[-1]) + 1


# -- x0 ----------------------------------------------------------------------------------------


def _output(call: StepCall) -> Tensor:
    """What the model predicts; the second half of its channels can be a learned variance."""
    channels = call.sample.shape[1]
    output = call.model_output
    return output[:, :channels] if output.shape[1] == 2 * channels else output


def _parts(call: StepCall, kind: str, prediction: str) -> Parts | None:
    """What x0 is made of, where the model predicts noise or velocity."""
    alpha, sigma = call.level.alpha, call.level.sigma
    if kind == "EDMDPMSolverMultistep" or prediction not in ("epsilon", "flow_prediction"):
        return None
    if prediction == "flow_prediction":
        return Parts(call.sample, _output(call), 1.0, sigma)
    if alpha <= 0:
        raise LatentsError("a prediction of the noise tells nothing of x0 at pure noise")
    return Parts(call.sample, _output(call), alpha, sigma)


def _algebra(call: StepCall, kind: str, prediction: str) -> Tensor:
    x, output = call.sample.float(), _output(call).float()
    alpha, sigma = call.level.alpha, call.level.sigma
    if kind == "EDMDPMSolverMultistep":
        preconditioned: Tensor = call.scheduler.precondition_outputs(x, output, torch.tensor(sigma))
        return preconditioned
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        # v = a noise - s x0 for unit-variance latents a x0 + s noise.
        size = math.hypot(alpha, sigma)
        return (alpha / size) * (x / size) - (sigma / size) * output
    raise LatentsError(
        f"{type(call.scheduler).__name__}: prediction_type {prediction!r} is not known"
    )
