"""One guarded call of a diffusers pipeline, from its arguments to what it returns."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentguard.denoised import Denoised, StepCall, denoised, is_last, level_before
from latentguard.errors import LatentsError
from latentguard.guard import output as outputs
from latentguard.guard.layout import packed_size, read
from latentguard.guard.patches import current, wrap_components
from latentguard.guard.sessions import Session
from latentguard.spaces import Latents

if TYPE_CHECKING:
    from latentguard.guard.adapter import LatentGuard

logger = logging.getLogger("latentguard.guard")

_CALLBACK, _INPUTS = "callback_on_step_end", "callback_on_step_end_tensor_inputs"
_completed: ContextVar[int] = ContextVar("latentguard_completed", default=0)
# What is decoded may have gone through half precision and the VAE's scaling since it was judged.
_SAME = 0.02


class Stop(BaseException):
    """Ends a pipeline whose every image is blocked.

    Not an Exception, so that no `except Exception` on the way may keep it.
    """


def guards_in(callback: Any) -> list[LatentGuard]:
    """The guards in a callback, which may be one, or a MultiPipelineCallbacks of some."""
    from latentguard.guard.adapter import LatentGuard

    return [part for part in _parts(callback) if isinstance(part, LatentGuard)]


def _parts(callback: Any) -> Iterator[Any]:
    from diffusers.callbacks import MultiPipelineCallbacks

    if isinstance(callback, MultiPipelineCallbacks):
        for part in callback.callbacks:
            yield from _parts(part)
    elif callback is not None:
        yield callback


def check_pipeline(pipe: Any) -> None:
    """Raises LatentsError where a pipeline's class has no step callback that sees the latents."""
    name = type(pipe).__name__
    parameters = _parameters(type(pipe))
    missing = [key for key in (_CALLBACK, _INPUTS) if key not in parameters]
    if missing or "latents" not in getattr(pipe, "_callback_tensor_inputs", ()):
        raise LatentsError(
            f"{name} has no {missing[0] if missing else 'latents in its step callback'}, so it "
            "cannot be guarded while it denoises: use output_type='latent' and Scorer, or "
            "latentguard.guard.session in a loop of your own"
        )


def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """Those of `__call__`; of the parent's where a subclass only hands on what it is given."""
    for base in cls.__mro__:
        if "__call__" in vars(base):
            found = inspect.signature(vars(base)["__call__"]).parameters
            if _CALLBACK in found or not _hands_on(found):
                return found
    return {}


def _hands_on(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def run(original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    """What a pipeline's `__call__` does once latentguard is imported."""
    from latentguard.guard.adapter import LatentGuard

    outer = current.get()
    if outer is not None and outer.pipe is pipe:
        return original(pipe, *args, **kwargs)  # a subclass calls its parent
    attached = pipe.callback_on_step_end
    misplaced = [key for key, value in kwargs.items() if key != _CALLBACK and guards_in(value)]
    if misplaced:
        raise LatentsError(f"give a LatentGuard as {_CALLBACK}, not as {misplaced[0]}")
    if (
        attached is None
        and _CALLBACK not in kwargs
        and not any(isinstance(value, LatentGuard) or guards_in(value) for value in args)
    ):
        return original(pipe, *args, **kwargs)
    signature = inspect.signature(original)
    if _CALLBACK not in signature.parameters:
        check_pipeline(pipe)
        return _handed_on(original, pipe, args, kwargs)
    bound = signature.bind(pipe, *args, **kwargs)
    callbacks = [*_parts(attached), *_parts(bound.arguments.get(_CALLBACK))]
    guards = list(dict.fromkeys(part for part in callbacks if isinstance(part, LatentGuard)))
    if not guards and attached is None:
        return original(pipe, *args, **kwargs)
    if guards:
        check_pipeline(pipe)
    others = [part for part in callbacks if not isinstance(part, LatentGuard)]
    return Call(pipe, signature, bound.arguments, guards, others).run(original)


def _handed_on(original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    """A subclass's `__call__` that hands its arguments on: the call inside is the guarded one."""
    before = _completed.get()
    output = original(pipe, *args, **kwargs)
    if _completed.get() == before:
        raise LatentsError(
            f"{type(pipe).__name__} returned without calling its parent class, so nothing was "
            "judged and its output is withheld"
        )
    return output


class Call:
    """A running call: its sessions, one for each guard, and what was seen of the loop so far.

    The user's own callbacks run first, in their order; then each guard sees the latents that they
    left, and has the last word.
    """

    def __init__(
        self,
        pipe: Any,
        signature: inspect.Signature,
        arguments: dict[str, Any],
        guards: list[LatentGuard],
        callbacks: list[Callable[..., Any]],
    ) -> None:
        self.pipe = pipe
        self._signature = signature
        self._arguments = arguments
        self._guards = guards
        self._callbacks = callbacks
        self._requested = self._user_inputs()
        self._sessions: list[Session] = []
        self._size = packed_size(arguments, pipe)
        self._space = guards[0].space_of(pipe) if guards else None
        self._seen: StepCall | None = None
        self._returned: Latents | None = None
        self._count = 0

    # -- the call ----------------------------------------------------------------------------

    def run(self, original: Callable[..., Any]) -> Any:
        """Call the pipeline, and return what may be seen of its output."""
        for guard in self._guards:
            guard.prepare(self.pipe)
        wrap_components(self.pipe)
        inputs = list(self._requested)
        allowed = getattr(self.pipe, "_callback_tensor_inputs", ())
        for name in ("latents", "denoised"):
            if self._guards and name in allowed and name not in inputs:
                inputs.append(name)
        arguments = {**self._arguments, _CALLBACK: self.callback, _INPUTS: inputs}
        bound = inspect.BoundArguments(self._signature, self._ordered(arguments))
        token = current.set(self)
        try:
            output = original(*bound.args, **bound.kwargs)
        except Stop:
            output = self._stopped_output()
        finally:
            current.reset(token)
            for guard, session in zip(self._guards, self._sessions, strict=False):
                guard.keep(session)
        output = self._finish(output)
        _completed.set(_completed.get() + 1)
        return output

    def _ordered(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        # BoundArguments takes them in the signature's order.
        return {name: arguments[name] for name in self._signature.parameters if name in arguments}

    def _user_inputs(self) -> list[str]:
        """The tensors that the user's callbacks want, as diffusers would find them."""
        names: list[str] = []
        for callback in self._callbacks:
            own = getattr(callback, "tensor_inputs", None)
            names += own if own is not None else self._arguments.get(_INPUTS) or ["latents"]
        names += self._arguments.get(_INPUTS) or []
        return list(dict.fromkeys(names))

    # -- what the patches report -------------------------------------------------------------

    def scheduler_step(
        self, original: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any
    ) -> Any:
        """Let the scheduler step, and keep what went in and came out."""
        bound = inspect.signature(original).bind(scheduler, *args, **kwargs)
        given = bound.arguments
        timestep, sample = given["timestep"], given["sample"]
        level = level_before(scheduler, timestep)
        kept = sample.clone()  # a scheduler may work in place
        result = original(scheduler, *args, **kwargs)
        self._seen = StepCall(scheduler, given["model_output"], timestep, kept, result, level)
        return result

    def saw_size(self, arguments: Mapping[str, Any]) -> None:
        """`prepare_latents` was called: the size in pixels that the pipeline works at."""
        self._size = packed_size(arguments, self.pipe) or self._size

    def before_decode(self, z: Tensor) -> Tensor:
        """What the VAE is about to decode, with zeros for images that are blocked.

        Latents that are not those which were judged last are judged here.
        """
        if not self._guards:
            return z
        space = self._space
        assert space is not None
        if self._is_judged(z):
            return z
        # A tiny autoencoder decodes scaled latents.
        tiny = type(self.pipe.vae).__name__ == "AutoencoderTiny"
        return self._judge_end(Latents(z, space, scaled=tiny)).tensor

    # -- each step ---------------------------------------------------------------------------

    def callback(
        self, pipe: Any, index: int, timestep: Any, given: dict[str, Any]
    ) -> dict[str, Any]:
        """The `callback_on_step_end` that the pipeline calls."""
        values = self._run_callbacks(pipe, index, timestep, dict(given))
        if not self._guards:
            return values
        seen, self._seen = self._seen, None
        tensor = values.get("latents", given["latents"])
        interrupted = bool(getattr(pipe, "_interrupt", False))
        last = interrupted or (index + 1 == getattr(pipe, "num_timesteps", None))
        last = last or (seen is not None and is_last(seen))
        # LCM pipelines decode `denoised`.
        name = "denoised" if last and "denoised" in given else "latents"
        tensor = values.get(name, given[name])
        latents = self._step(tensor, seen, last)
        values["latents"] = latents.tensor.reshape(tensor.shape).to(tensor.dtype)
        if "denoised" in given:
            values["denoised"] = values["latents"] if last else self._blank_rows(values["denoised"])
        if len(self._blocked()) == self._count:
            self._stop(pipe)
        return values

    def _run_callbacks(
        self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]
    ) -> dict[str, Any]:
        # Their own pipeline calls and decodes, previews for one, are not part of this call.
        token = current.set(None)
        try:
            for callback in self._callbacks:
                own = getattr(callback, "tensor_inputs", self._requested)
                got = callback(pipe, index, timestep, {name: values[name] for name in own})
                if not isinstance(got, dict):
                    raise TypeError(
                        f"callback_on_step_end must return a dict, {callback!r} returned "
                        f"{type(got).__name__}"
                    )
                values.update(got)
        finally:
            current.reset(token)
        return values

    def _step(self, tensor: Tensor, seen: StepCall | None, last: bool) -> Latents:
        assert self._space is not None
        latents = read(tensor, self._space, self._size)
        self._begin(latents)
        estimate, error = self._estimate(seen)
        for session in self._sessions:
            if estimate is None and not last:
                session.fail(error, noise_level=float("inf"))
                latents = session.blanked(latents)
                continue
            level = 0.0 if estimate is None else estimate.latents.noise_level
            x0 = None
            if estimate is not None and estimate.x0 is not None:
                x0 = read(estimate.x0.to(latents.tensor.dtype), self._space, self._size)
            result = session.step(
                latents,
                x0,
                noise_level=level,
                x0_noise_level=None if estimate is None else estimate.source.noise_level,
                alpha=1.0 if estimate is None else estimate.latents.alpha,
                final=last,
                how=None if estimate is None else estimate.how,
            )
            latents = result.latents
        # A copy: what runs after this callback could change the tensor in place.
        self._returned = latents.to(latents.tensor.dtype, copy=True)
        return latents

    def _begin(self, latents: Latents) -> None:
        if self._sessions:
            return
        self._count = len(latents)
        device = latents.tensor.device
        self._sessions = [guard.session_for(self.pipe, device) for guard in self._guards]

    def _estimate(self, seen: StepCall | None) -> tuple[Denoised | None, str]:
        name = type(self.pipe.scheduler).__name__
        if seen is None:
            return None, f"the step of the scheduler ({name}) was not seen"
        try:
            return denoised(seen), ""
        except LatentsError as error:
            return None, str(error)

    # -- the end -----------------------------------------------------------------------------

    def _blocked(self) -> set[int]:
        return {row for session in self._sessions for row in session.blocked}

    def _blank_rows(self, tensor: Tensor) -> Tensor:
        rows = sorted(self._blocked())
        if not rows:
            return tensor
        tensor = tensor.clone()
        tensor[torch.tensor(rows, device=tensor.device)] = 0
        return tensor

    def _stop(self, pipe: Any) -> None:
        """Every image is blocked: leave the pipeline, or its loop where its output is not known."""
        if self._blank_output() is not None:
            raise Stop
        pipe._interrupt = True

    def _is_judged(self, tensor: Tensor) -> bool:
        """Whether a tensor is what the last step gave back, judged as final."""
        judged = self._returned
        if judged is None or not all(session.finished for session in self._sessions):
            return False
        return any(_close(tensor, form) for form in _forms(judged))

    def _judge_end(self, latents: Latents) -> Latents:
        """Judge what the pipeline gives back, where no step has judged just that as final."""
        self._begin(latents)
        for session in self._sessions:
            latents = session.step(latents, noise_level=0.0, final=True).latents
        self._returned = latents
        return latents

    def _blank_output(self) -> Any:
        """The pipeline's output with nothing but blanks, or None where its form is not known."""
        assert self._returned is not None
        space = self._returned.space
        form = str(self._argument("output_type"))
        if form == "latent":
            images: Any = torch.zeros_like(self._returned.tensor)
        else:
            height, width = self._returned.height, self._returned.width
            images = outputs.blanks(self._count, height * space.factor, width * space.factor, form)
        if images is None:
            return None
        if self._argument("return_dict") is False:
            return (images,)
        cls = outputs.output_class(self.pipe)
        if cls is None:
            return None
        fields: dict[str, Any] = dict.fromkeys(getattr(cls, "__dataclass_fields__", {}))
        return cls(**{**fields, "images": images})

    def _argument(self, name: str) -> Any:
        default = (
            self._signature.parameters[name].default if name in self._signature.parameters else None
        )
        return self._arguments.get(name, default)

    def _stopped_output(self) -> Any:
        output = self._blank_output()
        self.pipe.maybe_free_model_hooks()
        return output

    def _finish(self, output: Any) -> Any:
        """Take blocked images out of what the pipeline returned."""
        if not self._guards:
            return output
        images = outputs.images_of(output)
        if self._argument("output_type") == "latent" and isinstance(images, Tensor):
            images = self._judged_latents(images)
        for guard, session in zip(self._guards, self._sessions, strict=False):
            if not session.finished:
                session.fail("the final latents were never seen", final=True)
            guard.keep(session)
        if not self._sessions:
            # Nothing was seen at all, not even how many images there are.
            raise LatentsError(
                f"{type(self.pipe).__name__} returned without a single step or decoded latent that "
                "could be judged, so its output is withheld"
            )
        for guard, session in zip(self._guards, self._sessions, strict=True):
            images = guard.withhold(session, images, output)
        return outputs.with_images(output, images)

    def _judged_latents(self, images: Tensor) -> Tensor:
        if self._is_judged(images):
            return images
        assert self._space is not None
        judged = self._judge_end(read(images, self._space, self._size))
        if images.ndim == 4 and self._space.packed_patch > 1:
            # FLUX.2's pipelines differ in whether they give back scaled latents or raw ones.
            judged = self._judge_end(Latents(judged.tensor, self._space, scaled=False))
        return judged.tensor.reshape(images.shape).to(images.dtype)


def _forms(judged: Latents) -> Iterator[Tensor]:
    """The forms in which pipelines hand on latents: as they are, spatial, and raw."""
    yield judged.tensor
    spatial = judged.spatial()
    yield spatial.tensor
    try:
        yield spatial.raw().tensor
    except LatentsError:
        return  # a space without the numbers for it


def _close(tensor: Tensor, other: Tensor) -> bool:
    if tensor.numel() != other.numel():
        return False
    a, b = tensor.detach().float().reshape(-1), other.detach().float().reshape(-1).to(tensor.device)
    return bool((a - b).abs().max() <= _SAME * b.abs().max().clamp_min(1.0))
