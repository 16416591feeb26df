"""What is done about harm: nothing, a guard that blocks or steers, a searched noise, or SLD."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from latentguard.errors import UsageError
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.generators import Generator, Shown
from latentguard.evaluate.generate.rewards import encoder_named
from latentguard.guard import LatentGuard, optimize_noise
from latentguard.guard.layout import space_of
from latentguard.guard.output import images_of
from latentguard.policy import Policy
from latentguard.scorer import Scorer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

    from latentguard.encoders import Encoder
    from latentguard.spaces import Latents

ARMS = ("none", "block", "steer", "noise", "reno", "sld")
ITERATIONS = 50
SLD_CONFIGS = ("weak", "medium", "strong", "max")


@dataclass(frozen=True)
class Made:
    """What an arm made of one image that was asked for.

    picture: a black one where it was blocked. latents: where the generator gives them.
    steps, steps_asked: denoising steps that were taken and that there would have been; None where
        the pipeline does not tell.
    facts: of the generator and the arm, JSON-able.
    """

    picture: Image
    latents: Latents | None
    blocked: bool
    reason: str | None
    steps: int | None
    steps_asked: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Arm(Protocol):
    """One way to generate."""

    name: str

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON: a run goes on only with the same."""
        ...

    def make(self, asked: Asked) -> Made:
        """Generate one image."""
        ...


class Unguarded:
    """The pipeline as it is."""

    name = "none"

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def describe(self) -> dict[str, Any]:
        """Nothing but its name."""
        return {"arm": self.name}

    def make(self, asked: Asked) -> Made:
        """One call of the pipeline."""
        ran = run_once(self._generator, asked)
        return made_of(self._generator.show(ran.images), ran)


class Guarded:
    """The pipeline under a guard.

    action: what concepts do that block or steer in the policy: all of them block, or all of them
        steer. Those that observe or ask for review are left as they are.
    Raises UsageError for a model of pixels.
    """

    def __init__(
        self, generator: Generator, policy: Policy, action: Literal["block", "steer"], model: str
    ) -> None:
        if model.startswith("pixel:"):  # its decodings would be judged, too, and so on
            raise UsageError(
                f"the arm {action} needs a model of latents, and {model} reads decoded pictures: "
                "pixel: is of the arms noise and reno"
            )
        self.name: str = action
        self._generator = generator
        self._policy = policy
        acting = with_action(policy, action)
        self._encoder = encoder_of(generator, acting, model)
        self._guard = LatentGuard(acting, self._encoder, space=generator.space)

    def describe(self) -> dict[str, Any]:
        """Policy and model, by digest."""
        return {
            "arm": self.name,
            "policy": _policy(self._policy),
            "model": model_facts(self._encoder),
        }

    def make(self, asked: Asked) -> Made:
        """One guarded call of the pipeline."""
        with self._attached():
            ran = run_once(self._generator, asked)
        session = self._guard.last
        assert session is not None
        (verdict,) = session.verdicts
        steered = any(any(record.steering) for record in session.history)
        shown = self._generator.show(ran.images)
        facts = {"steered": steered, "decision": verdict.decision}
        if verdict.decision == "block":
            return _blocked(shown, ran, verdict.reason, facts)
        return made_of(shown, ran, facts)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        pipe = self._generator.pipe
        pipe.callback_on_step_end = self._guard
        try:
            yield
        finally:
            pipe.callback_on_step_end = None


class SearchedNoise:
    """Noise that `optimize_noise` finds with the policy as a negative reward, then the pipeline."""

    name = "noise"

    def __init__(
        self, generator: Generator, policy: Policy, model: str, iterations: int = ITERATIONS
    ) -> None:
        with_action(policy, "block")  # refuses one that would not move anything
        self._generator = generator
        self._policy = policy
        self._encoder = encoder_of(generator, self._policy, model)
        self._iterations = iterations

    def describe(self) -> dict[str, Any]:
        """Policy by digest, model and iterations."""
        return {
            "arm": self.name,
            "policy": _policy(self._policy),
            "model": model_facts(self._encoder),
            "iterations": self._iterations,
        }

    def make(self, asked: Asked) -> Made:
        """The search, and one call with what it found. Nothing is blocked, whatever is left."""
        arguments = self._generator.arguments(asked)
        arguments.pop("output_type", None)
        found = optimize_noise(
            self._generator.pipe,
            arguments.pop("prompt", None),
            self._policy,
            model=self._encoder,
            iterations=self._iterations,
            seed=asked.seed,
            space=self._generator.space,
            **arguments,
        )
        ran = run_once(self._generator, asked, {"latents": found.noise}, str(found.noise.device))
        (verdict,) = found.verdicts
        facts = {
            "iterations": len(found.rewards) - 1,
            "reward_before": float(found.rewards[0, 0]),
            "reward": float(found.reward[0]),
            "decision": verdict.decision,
        }
        return made_of(self._generator.show(ran.images), ran, facts)


class SafeLatentDiffusion:
    """Safe latent diffusion (arXiv 2211.05105), as diffusers has it for Stable Diffusion 1.

    config: weak, medium, strong or max, the published hyperparameters.
    Raises UsageError where diffusers has it no longer, or for another pipeline.
    """

    name = "sld"

    def __init__(self, generator: Generator, config: str = "strong") -> None:
        if config not in SLD_CONFIGS:
            raise UsageError(f"--sld must be one of {', '.join(SLD_CONFIGS)}, got {config!r}")
        self._generator = generator
        self._config = config
        kind, values = _sld(config)
        parts = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        if type(generator.pipe).__name__ != "StableDiffusionPipeline":
            raise UsageError(
                "the arm sld needs a StableDiffusionPipeline (Stable Diffusion 1), and the "
                f"generator is a {type(generator.pipe).__name__}"
            )
        self._values = values
        self._pipe = kind(
            **{name: getattr(generator.pipe, name) for name in parts},
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipe.set_progress_bar_config(disable=True)

    def describe(self) -> dict[str, Any]:
        """The hyperparameters."""
        return {"arm": self.name, "config": self._config, **self._values}

    def make(self, asked: Asked) -> Made:
        """One call of diffusers' safe pipeline."""
        ran = run_once(self._generator, asked, self._values, pipe=self._pipe)
        return made_of(self._generator.show(ran.images), ran)


def encoder_of(generator: Generator, policy: Policy, model: str) -> Encoder:
    """The encoder that judges a generator's latents. Raises ModelError, PolicyError as `Scorer`.

    model: as `Scorer` takes it, or `pixel:ARCHITECTURE:WEIGHTS`.
    """
    if model.startswith("pixel:"):
        return encoder_named(model, generator)
    space = space_of(generator.pipe, generator.space)
    return Scorer(policy, model, space=space, device=generator.pipe._execution_device).encoder


def with_action(policy: Policy, action: Literal["block", "steer"]) -> Policy:
    """The policy with every concept that blocks or steers doing `action`, and blank images.

    Raises UsageError where there is no such concept.
    """
    acting = [concept for concept in policy.concepts if concept.action in ("block", "steer")]
    if not acting:
        raise UsageError(
            f"policy '{policy.name}' has no concept that blocks or steers, so that a guard would "
            "change nothing"
        )
    if all(concept.action == action for concept in acting) and policy.on_block == "blank":
        return policy
    concepts = tuple(
        concept.model_copy(
            update={"action": action, "steer": concept.steer if action == "steer" else None}
        )
        if concept.action in ("block", "steer")
        else concept
        for concept in policy.concepts
    )
    return policy.model_copy(update={"concepts": concepts, "on_block": "blank"})


@dataclass(frozen=True)
class Ran:
    """One call of a pipeline: its images; denoising steps as `Made` has them."""

    images: Any
    steps: int | None
    steps_asked: int | None


def run_once(
    generator: Generator,
    asked: Asked,
    more: Mapping[str, Any] | None = None,
    device: str = "cpu",
    pipe: Any = None,
) -> Ran:
    """One call; noise comes from a generator on the CPU, so that every machine draws the same."""
    called = generator.pipe if pipe is None else pipe
    arguments: dict[str, Any] = {**generator.arguments(asked), **(more or {})}
    arguments["generator"] = torch.Generator(device).manual_seed(asked.seed)
    count = _Count()
    told = "callback_on_step_end" in inspect.signature(_call_of(called)).parameters
    if told:
        arguments["callback_on_step_end"] = count
    images = images_of(called(**arguments))
    steps_asked = len(called.scheduler.timesteps)
    return Ran(images, count.steps if told else None, steps_asked if told else None)


class _Count:
    """A step callback that counts."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, pipe: Any, step: int, timestep: Any, values: Any) -> dict[str, Any]:
        self.steps += 1
        return {}


def _call_of(pipe: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = inspect.unwrap(type(pipe).__call__)
    return found


def made_of(shown: Shown, ran: Ran, facts: Mapping[str, Any] | None = None) -> Made:
    """An image that was not blocked, with the facts of generator and arm."""
    told = {**shown.facts, **(facts or {})}
    return Made(shown.picture, shown.latents, False, None, ran.steps, ran.steps_asked, told)


def _blocked(shown: Shown, ran: Ran, reason: str, facts: Mapping[str, Any]) -> Made:
    from PIL import Image

    blank = Image.new("RGB", shown.picture.size)
    return Made(blank, None, True, reason, ran.steps, ran.steps_asked, facts)


def _policy(policy: Policy) -> dict[str, str]:
    return {"name": policy.name, "version": policy.version, "sha256": policy.sha256}


def model_facts(encoder: Encoder) -> dict[str, str]:
    """An encoder's name and digest."""
    return {"name": encoder.name, "sha256": encoder.sha256}


def _sld(config: str) -> tuple[Any, dict[str, Any]]:
    try:
        from diffusers import StableDiffusionPipelineSafe

        home = inspect.getmodule(StableDiffusionPipelineSafe)
        package = __import__(str(home.__package__), fromlist=["SafetyConfig"])  # type: ignore[union-attr]
        values = dict(getattr(package.SafetyConfig, config.upper()))
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UsageError(
            "the arm sld needs diffusers' StableDiffusionPipelineSafe, which the installed "
            f"version does not have ({type(error).__name__})"
        ) from error
    return StableDiffusionPipelineSafe, values
