"""One guarded call of a diffusers pipeline, from its arguments to what it returns."""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentguard.denoised import (
    Denoised,
    StepCall,
    denoised,
    denoised_unseen,
    is_last,
    level_before,
)
from latentguard.errors import LatentsError
from latentguard.guard import arguments as named
from latentguard.guard import output as outputs
from latentguard.guard.answers import Blocked, blurred
from latentguard.guard.components import decoder_of, wrap_components
from latentguard.guard.decoding import Decoding
from latentguard.guard.forms import SPATIAL
from latentguard.guard.layout import Layout, decoded_layout, is_tiny, layout_of, pixels_in
from latentguard.guard.outermost import Outermost
from latentguard.guard.record import Attempt, CallRecord, Outcome
from latentguard.guard.retry import Again, seed_of
from latentguard.guard.running import CALLBACK, INPUTS, current, waiting
from latentguard.guard.sessions import Session
from latentguard.guard.tensors import equal, plain, private
from latentguard.guard.wrapping import names_of
from latentguard.spaces import Latents, LatentSpace, Prediction

if TYPE_CHECKING:
    from latentguard.guard.adapter import LatentGuard

logger = logging.getLogger("latentguard.guard")

# A loop that is left this early gives latents that are still noisy; then their x0 counts too.
_CLEAN_ENOUGH = 0.1
# Tensors that a VAE was given, kept so that a `decode` within a `decode` is judged once.
_KEPT = 4


class Stop(BaseException):
    """Ends a pipeline whose every image is blocked.

    Not an Exception, so that no `except Exception` on the way may keep it.
    """


class GuardedCall:
    """A running call: its sessions, one for each guard, and what was seen of the loop so far.

    At each step the guards judge first, so that a preview made by a callback of the user's shows
    nothing that is blocked; then those callbacks run, in their order; and what they make of blocked
    images and of final latents is judged again, so that the guards have the last word.
    """

    def __init__(
        self,
        pipe: Any,
        signature: inspect.Signature,
        arguments: dict[str, Any],
        guards: list[LatentGuard],
        callbacks: list[Callable[..., Any]],
        again: Again | None = None,
    ) -> None:
        self.pipe = pipe
        self._signature = signature
        self._arguments = arguments
        self.guards = guards
        self._callbacks = callbacks
        self._again = again
        self.outcomes: list[Outcome] = []
        self._requested = self._user_inputs()
        self.sessions: list[Session] = []
        self._space = guards[0]._space_of(pipe) if guards else None
        self._layout = None if self._space is None else self._layout_in(self._space)
        self._decoding = None if self._space is None else Decoding.of(pipe, self._space)
        self._pixels = self._size_asked()
        self.count = 0
        self._seen: StepCall | None = None
        self._latest: Denoised | None = None  # of the last step
        self._judged: Latents | None = None  # what was judged as final
        self._handed: Tensor | None = None  # what the pipeline goes on with
        self._decoded = False  # since the last step
        self._let_through: deque[Tensor] = deque(maxlen=_KEPT)  # what the VAE was given
        self._blank: Any = None
        self._left = False  # the guard has made the pipeline skip the rest of its loop
        self._blanked: list[int] = []  # the images that are blank in what was returned
        self._running: list[Any] = []

    def _layout_in(self, space: LatentSpace) -> Layout:
        """How the pipeline's latents hold those of a space."""
        return layout_of(self.pipe, space)

    # -- the call ----------------------------------------------------------------------------

    def run(self, original: Callable[..., Any]) -> Any:
        """Call the pipeline, and return what may be seen of its output."""
        for guard in self.guards:
            guard._prepare(self.pipe)
        wrap_components(self.pipe)
        inputs = list(self._requested)
        allowed = getattr(self.pipe, "_callback_tensor_inputs", ())
        for name in ("latents", "denoised"):
            if self.guards and name in allowed and name not in inputs:
                inputs.append(name)
        arguments = {**self._arguments, CALLBACK: self.callback, INPUTS: inputs}
        bound = named.bound(self._signature, arguments)
        outer = current.get()
        token = current.set(self)
        try:
            with self.entering(original):
                output = original(*bound.args, **bound.kwargs)
            output = self.recorded(self._finish(output))
        except Stop:
            output = self.recorded(self._stopped_output())
        finally:
            current.reset(token)
            within = isinstance(outer, Outermost) and outer.pipe is self.pipe
            self._keep()
            if within:
                outer.began(self)
        if within:
            outer.returned(self)
        return output

    def _keep(self) -> None:
        """The guards tell of this call, unless it repeats another one, of which they tell."""
        if self._again is None:
            for guard, session in zip(self.guards, self.sessions, strict=False):
                guard._keep(session)

    def end(self) -> None:
        """Nothing of this call is left to be judged."""
        for guard, session in zip(self.guards, self.sessions, strict=False):
            guard._ended(session)

    def enters(self, original: Callable[..., Any]) -> bool:
        """Whether a `__call__` that is entered now is part of this call: a parent class's.

        One that runs already is entered for another generation, by a callback for example.
        """
        return original not in self._running

    @contextmanager
    def entering(self, original: Callable[..., Any]) -> Iterator[None]:
        """While a `__call__` that is part of this call runs."""
        self._running.append(original)
        try:
            yield
        finally:
            self._running.remove(original)

    def _user_inputs(self) -> list[str]:
        """The tensors that the user's callbacks want, as diffusers would find them."""
        names: list[str] = []
        for callback in self._callbacks:
            own = getattr(callback, "tensor_inputs", None)
            names += self._asked() if own is None else own
        names += self._arguments.get(INPUTS) or []
        return list(dict.fromkeys(names))

    def _asked(self) -> list[str]:
        """The tensors for callbacks that name none themselves."""
        asked = self._argument(INPUTS)
        return ["latents"] if asked is None else list(asked)

    # -- what the patches report -------------------------------------------------------------

    def scheduler_step(
        self, original: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any
    ) -> Any:
        """Let the scheduler step, and keep what went in and came out."""
        names, own = names_of(type(scheduler), "step", original)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if not {"model_output", "timestep", "sample"} <= given.keys():
            return original(scheduler, *args, **kwargs)  # of its own form: its parent's is seen
        self._judged, self._decoded = None, False  # whatever was judged as final, the loop goes on
        timestep = given["timestep"]
        try:
            level = level_before(scheduler, timestep)
            kept = private(given["sample"])  # a scheduler may work in place
            model_output = plain(given["model_output"])
        except Exception:  # it counts as a step that was not seen
            logger.exception("no noise level from %s", type(scheduler).__name__)
            return original(scheduler, *args, **kwargs)
        self._seen = None
        result = original(scheduler, *args, **kwargs)
        # The outermost step counts, unless it only passes on to one that was seen within.
        if own or self._seen is None:
            self._seen = StepCall(scheduler, model_output, timestep, kept, result, level)
        return result

    def begins_loop(self) -> bool:
        """Whether a loop may begin: within a guarded call it may."""
        return True

    def saw_size(self, arguments: Mapping[str, Any]) -> None:
        """`prepare_latents` is called: the size in pixels that the pipeline works at."""
        self._pixels = pixels_in(arguments) or self._pixels

    def saw_first(self, prepared: Any) -> None:
        """`prepare_latents` returned the latents that the loop begins with, or a tuple of them."""
        first = prepared[0] if isinstance(prepared, tuple) and prepared else prepared
        self._handed = first if isinstance(first, Tensor) else None

    def before_decode(self, z: Tensor) -> Tensor:
        """What the VAE is about to decode, with zeros for images that are blocked.

        Latents that are not those which were judged as final are judged here.
        """
        if not self.guards:
            return z
        assert self._space is not None
        z = private(z)
        self._decoded = True
        rows = self._rows_of(z)
        if rows is not None:
            z[[row in self._blocked() for row in rows]] = 0
        elif not self.let_through(z):
            # A tiny autoencoder decodes scaled latents.
            layout, scaled = decoded_layout(self._space), is_tiny(decoder_of(self.pipe))
            z = layout.written(self._judge_end(layout.read(z, None, scaled)), z)
        self._let_through.append(z.clone())
        return z

    def let_through(self, z: Tensor) -> bool:
        """Whether the VAE was given just this a moment ago."""
        return any(equal(one, z) for one in self._let_through)

    def _rows_of(self, z: Tensor) -> list[int] | None:
        """Which of the images that were judged as final these are, as the VAE gets them."""
        if self._judged is None or self._decoding is None:
            return None
        return self._decoding.rows(self._judged, z)

    # -- each step ---------------------------------------------------------------------------

    def callback(
        self, pipe: Any, index: int, timestep: Any, given: dict[str, Any]
    ) -> dict[str, Any]:
        """The `callback_on_step_end` that the pipeline calls."""
        if not self.guards:
            return self._run_callbacks(pipe, index, timestep, dict(given))
        seen, self._seen = self._seen, None
        last = self._ends(pipe, index, seen)
        given = _plain(given)
        estimate, error = self._estimate(seen, timestep, given["latents"])
        values = self._judged_values(given, estimate, error, last)
        if self._callbacks:
            # A copy: they may work in place.
            left = values["latents"].clone() if last else None
            values = _plain(self._run_callbacks(pipe, index, timestep, values))
            wrap_components(pipe)  # they may have replaced some
            ended, last = last, last or self._ends(pipe, index, seen)
            if last and not (ended and equal(left, values[self._decodes(values, last)])):
                values = self._judged_values(values, estimate, error, last)
            elif not last:
                values = {**values, "latents": self._blank_rows(values["latents"])}
                self._handed = values["latents"]
        if self._all_blocked():
            self._stop(pipe, values["latents"])
        return values

    def _judged_values(
        self, values: dict[str, Any], estimate: Denoised | None, error: str, last: bool
    ) -> dict[str, Any]:
        """Let every guard judge, and put the latents that they leave among the tensors."""
        tensor = values[self._decodes(values, last)]
        if last:
            tensor = private(tensor)
        latents = self._step(tensor, estimate, error, last)
        values["latents"] = self._written(latents, tensor)
        if "denoised" in values:
            values["denoised"] = values["latents"] if last else self._blank_rows(values["denoised"])
        # A copy: what runs after this callback could change the tensor in place.
        self._judged = latents.to(tensor.dtype, copy=True) if last else None
        self._handed = values["latents"]
        return values

    @staticmethod
    def _decodes(values: Mapping[str, Any], last: bool) -> str:
        """Which tensor the pipeline goes on with: LCM's decode `denoised`."""
        return "denoised" if last and "denoised" in values else "latents"

    def _ends(self, pipe: Any, index: int, seen: StepCall | None) -> bool:
        """Whether no step follows."""
        if getattr(pipe, "interrupt", False) or index + 1 == getattr(pipe, "num_timesteps", None):
            return True
        try:
            return seen is not None and is_last(seen)
        except Exception:  # a scheduler that was changed since
            return False  # what is decoded is judged in any case

    def _run_callbacks(
        self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]
    ) -> dict[str, Any]:
        # Their own pipeline calls and decodes, previews for one, are not part of this call.
        token, outer = current.set(None), waiting.set((*waiting.get(), self))
        try:
            for callback in self._callbacks:
                own = getattr(callback, "tensor_inputs", self._asked())
                got = callback(pipe, index, timestep, {name: values[name] for name in own})
                if not isinstance(got, dict):
                    raise TypeError(
                        f"callback_on_step_end must return a dict, {callback!r} returned "
                        f"{type(got).__name__}"
                    )
                values.update(got)
        finally:
            current.reset(token)
            waiting.reset(outer)
        return values

    def _step(self, tensor: Tensor, estimate: Denoised | None, error: str, last: bool) -> Latents:
        latents = self._read(tensor)
        self._begin(latents)
        for session in self.sessions:
            if estimate is None:
                latents = self._step_unseen(session, latents, error, last)
            else:
                latents = self._step_seen(session, latents, estimate, last)
        return latents

    def _step_unseen(self, session: Session, latents: Latents, error: str, last: bool) -> Latents:
        if last:
            return session.step(latents, noise_level=0.0, final=True).latents
        session.fail(error, noise_level=float("inf"))
        return session.blanked(latents)

    def _step_seen(
        self, session: Session, latents: Latents, estimate: Denoised, last: bool
    ) -> Latents:
        if last:
            self._step_noisy(session, estimate)
        return session.step(
            latents,
            self._told(session, latents, estimate),
            noise_level=estimate.level_after.noise_level,
            x0_noise_level=estimate.level_before.noise_level,
            alpha=estimate.level_after.alpha,
            final=last,
            estimate_source=estimate.estimate_source,
        ).latents

    def _told(self, session: Session, latents: Latents, estimate: Denoised) -> Latents | Prediction:
        """The clean estimate, or what it is made of where the session only scores it."""
        assert self._layout is not None
        parts = estimate.parts
        # A callback of the user's may have changed in place what x0 was made of.
        alone = session.scores_only and not self._callbacks
        if alone and parts is not None and self._layout.forms == (SPATIAL,):
            noisy = self._read(plain(parts.sample))
            return Prediction(noisy, plain(parts.noise), parts.alpha, parts.sigma)
        return self._read(estimate.x0.to(latents.tensor.dtype))

    def _step_noisy(self, session: Session, estimate: Denoised) -> None:
        """Whoever gets latents that are still noisy can denoise them: x0 is judged as well."""
        if estimate.level_after.noise_level > _CLEAN_ENOUGH:
            x0 = self._read(estimate.x0)
            level = estimate.level_before.noise_level
            session.step(
                x0, noise_level=level, final=True, estimate_source=estimate.estimate_source
            )

    def _read(self, tensor: Tensor) -> Latents:
        """A tensor of the loop as scaled latents."""
        assert self._layout is not None
        return self._layout.read(tensor, self._pixels)

    def _written(self, latents: Latents, like: Tensor) -> Tensor:
        """Latents in the form, dtype and strides of a tensor of the loop."""
        assert self._layout is not None
        return self._layout.written(latents, like)

    def _size_asked(self) -> tuple[int, int] | None:
        """Height and width in pixels that the call asks for, or its defaults are."""
        return pixels_in({side: self._argument(side) for side in ("height", "width")})

    def _begin(self, latents: Latents) -> None:
        if self.sessions:
            return
        device = latents.tensor.device
        for guard in self.guards:
            session = guard._session_for(self.pipe, device)
            session.prompts = self._prompts(len(latents))
            if self._again is not None:
                self._again.add(guard, session)
            session.begin(len(latents))
            self.sessions.append(session)
        self.count = len(latents)

    def _prompts(self, count: int) -> list[str]:
        """The prompt of each image; nothing where the call had none, or embeddings."""
        given = self._argument("prompt")
        prompts = [given] if isinstance(given, str) else given
        if not isinstance(prompts, list) or not prompts or count % len(prompts):
            return []
        return [str(prompt) for prompt in prompts for _ in range(count // len(prompts))]

    def _estimate(
        self, seen: StepCall | None, timestep: Any, latents: Tensor
    ) -> tuple[Denoised | None, str]:
        self._latest = None
        name = type(self.pipe.scheduler).__name__
        # Whatever goes wrong, the policy's `on_error` decides.
        try:
            if seen is not None:
                told = denoised(seen)
                self._latest = replace(told, x0=plain(told.x0))
            elif self._handed is None or self._handed.shape != latents.shape:
                return None, f"the step of the scheduler ({name}) was not seen"
            elif self._argument("eta"):
                return None, f"the step of the scheduler ({name}) was not seen, and eta adds noise"
            else:
                before = self._handed
                self._latest = denoised_unseen(self.pipe.scheduler, timestep, before, latents)
        except Exception as error:
            logger.exception("no clean estimate from %s", name)
            return None, str(error) or type(error).__name__
        return self._latest, ""

    # -- the end -----------------------------------------------------------------------------

    def _blocked(self) -> list[int]:
        return sorted({row for session in self.sessions for row in session.blocked})

    def _all_blocked(self) -> bool:
        """Whether each image is blocked, by whichever guard; of those that a repetition is for."""
        blocked = self._blocked()
        if self._again is not None and self._again.rows is not None:
            return bool(blocked) and self._again.rows <= set(blocked)
        return len(blocked) == self.count

    def _blank_rows(self, tensor: Tensor) -> Tensor:
        rows = self._blocked()
        if not rows:
            return tensor
        if len(tensor) != self.count:
            return torch.zeros_like(tensor)  # which of them is blocked cannot be told
        tensor = tensor.clone()
        tensor[torch.tensor(rows, device=tensor.device)] = 0
        return tensor

    def _stop(self, pipe: Any, latents: Tensor) -> None:
        """Every image is blocked: leave the pipeline, or its loop where its output is not known."""
        self._blank = self._blank_output(latents)
        if self._blank is not None:
            raise Stop
        self._left = pipe._interrupt = True

    def _is_judged(self, tensor: Tensor) -> bool:
        """Whether a tensor is what was judged as final: packed, spatial, or as the VAE gets it."""
        judged = self._judged
        if judged is None or len(judged) != len(tensor):
            return False
        forms = [judged.tensor, judged.to_spatial().tensor]
        if self._layout is not None and self._layout.fits(tensor):
            forms.append(self._written(judged, tensor))
        if any(equal(form.to(tensor.device, tensor.dtype), tensor) for form in forms):
            return True
        rows = None if tensor.ndim not in (4, 5) else self._rows_of(tensor)
        return rows == list(range(len(judged)))

    def _is_untouched(self) -> bool:
        """Whether the tensor that the pipeline got still holds what was judged as final."""
        if self._judged is None or self._handed is None:
            return False
        return equal(self._handed, self._written(self._judged, self._handed))

    def _judge_end(self, latents: Latents) -> Latents:
        """Judge what the pipeline gives back, where no step has judged just that as final."""
        self._begin(latents)
        for session in self.sessions:
            if self._latest is not None:  # a loop that was left early
                self._step_noisy(session, self._latest)
            latents = session.step(latents, noise_level=0.0, final=True).latents
        return latents

    def _blank_output(self, tensor: Tensor) -> Any:
        """The pipeline's output with nothing but blanks, or None where its form is not known."""
        assert self._space is not None
        form = str(self._argument("output_type"))
        cls = outputs.output_class(self.pipe)
        # Pipelines of packed spaces differ in the form of the latents that they give back, some
        # images have transparency, and one that was cropped for inpainting is put back into the
        # whole of it.
        assert self._layout is not None
        colors = outputs.drawn_channels(self.pipe) == 3
        differs = self._layout.forms != (SPATIAL,) if form == "latent" else not colors
        if cls is None or differs or self._argument("padding_mask_crop") is not None:
            return None
        if form == "latent":
            images: Any = torch.zeros_like(tensor)
        else:
            latents = self._read(tensor)
            height, width = (
                side * latents.space.vae_scale_factor for side in (latents.height, latents.width)
            )
            images = outputs.blanks(len(latents), height, width, form)
        if images is None:
            return None
        fields: dict[str, Any] = dict.fromkeys(getattr(cls, "__dataclass_fields__", {}))
        fields[next(name for name in outputs.IMAGES if name in fields)] = images
        if self._argument("return_dict") is False:
            return tuple(fields.values())
        return cls(**fields)

    def _argument(self, name: str) -> Any:
        """An argument of the call, among its **kwargs too; its default where it was not given."""
        return named.given(self._signature, self._arguments, name)

    def _stopped_output(self) -> Any:
        self.pipe.maybe_free_model_hooks()
        latents = self._argument("output_type") == "latent"
        return self._withheld(self._blank, outputs.images_of(self._blank), latents)

    def _finish(self, output: Any) -> Any:
        """Take blocked images out of what the pipeline returned."""
        if not self.guards:
            return output
        told = self._argument("output_type") == "latent"
        output, images, are_latents = self._with_judged_latents(output, told)
        unseen = not self._decoded and not self._is_untouched()
        for session in self.sessions:
            if not are_latents and not session.stopped and (unseen or not session.finished):
                session.fail("what was decoded was never seen", final=True)
        if not self.sessions:
            # Nothing was seen at all, not even how many images there are.
            raise LatentsError(
                f"{type(self.pipe).__name__} returned without a single step or decoded latent that "
                "could be judged, so its output is withheld"
            )
        return self._withheld(output, images, are_latents)

    def finish_again(self, output: Any, touched: bool, stepped: bool) -> Any:
        """Take blocked images out of what a subclass made of what this call returned.

        touched: it denoised or decoded something of its own. stepped: it did so, and what came of
        that was not decoded.
        """
        output, images, are_latents = self._with_judged_latents(output, told=False)
        if stepped and not are_latents:
            for session in self.sessions:
                session.fail("what a subclass made of it was never seen", final=True)
        if touched or self._blocked() != self._blanked:
            output = self._withheld(output, images, are_latents)
        return self.recorded(output)

    def _with_judged_latents(self, output: Any, told: bool) -> tuple[Any, Any, bool]:
        """An output, its images, and whether these are latents; those are judged, and a copy.

        told: the call asked for latents. Otherwise they are known by their shape.
        """
        assert self._space is not None
        images = outputs.images_of(output)
        if told and isinstance(images, Tensor):
            latents: Tensor | None = private(images)
        else:
            assert self._layout is not None
            latents = outputs.latents_in(images, self._layout)
        if latents is None:
            outputs.check_pixels(images, self.pipe)
            return output, images, False
        if self.sessions and self._all_blocked():
            latents = torch.zeros_like(latents)
        else:
            latents = self._judged_latents(latents)
        images = outputs.in_form_of(images, latents)
        return outputs.with_images(output, images), images, True

    def recorded(self, output: Any) -> Any:
        """The output with the record of this call."""
        if not self.sessions:
            return output
        return outputs.with_record(output, CallRecord.of(self.sessions))

    def _withheld(self, output: Any, images: Any, latents: bool) -> Any:
        """The output with blanks for what any guard has blocked, or what guards give instead."""
        blocked = self._blanked = self._blocked()
        if blocked:
            by = [s.verdicts for s in self.sessions if s.blocked]
            images = outputs.blanked(images, blocked, by)
            output = outputs.with_images(output, images)
        output = outputs.flagged(output, blocked, self.count, outputs.output_class(self.pipe))
        return self._answered(output, images, latents)

    def _answered(self, output: Any, images: Any, latents: bool) -> Any:
        """The output with what the guards' `on_block` gives in the place of blanks.

        images: with the blanks; None where there are none. latents: whether they are latents.
        Raises GenerationBlocked where one says `raise`.
        """
        blocked = self._blocked()
        self.outcomes = [Outcome("allowed")] * self.count
        instead: dict[int, Any] = {}
        # What is asked now may generate: that is a call of its own.
        token, outer = current.set(None), waiting.set((*waiting.get(), self))
        try:
            for row in blocked:
                blank = None if images is None else images[row]
                instead[row], self.outcomes[row] = self._instead(row, blank, latents)
        finally:
            current.reset(token)
            waiting.reset(outer)
        if blocked and images is not None:
            given = outputs.replaced(images, blocked, instead.__getitem__)
            output = outputs.with_images(output, given)
        raising = [one for guard, one in self._blocking() if guard._answers.word == "raise"]
        if raising and self._again is None:
            for row in blocked:
                self.outcomes[row] = Outcome("raised")
            self.told()
            raise outputs.GenerationBlocked(raising[0].verdicts, output)
        self.told()
        return output

    def _blocking(self, row: int | None = None) -> list[tuple[LatentGuard, Session]]:
        """The guards that block an image, or any, with their sessions."""
        return [
            (guard, session)
            for guard, session in zip(self.guards, self.sessions, strict=True)
            if (session.blocked if row is None else row in session.blocked)
        ]

    def _instead(self, row: int, blank: Any, latents: bool) -> tuple[Any, Outcome]:
        """What takes the place of a blocked image, and how that is told.

        Of several guards that give something the last one does; a blur, which shows something of
        the image, is given only where all that block it say so.
        """
        blocking = self._blocking(row)
        found = blank, Outcome("blanked")
        if blank is None or self._again is not None:
            return found
        words = {guard._answers.word for guard, _ in blocking}
        if words == {"retry"}:
            return blank, Outcome("blanked", note="it was not generated anew")
        preview = None if latents else self._preview(row, blank)
        if words == {"blur"}:
            if preview is not None:
                return preview, Outcome("blurred")
            why = "latents are returned" if latents else "nothing that can be shown was seen of it"
            return blank, Outcome("blanked", note=why)
        if "blur" in words and words <= {"blur", "blank", "retry"}:
            return blank, Outcome("blanked", note="not every guard that blocks it says blur")
        if latents and "placeholder" in words:
            found = blank, Outcome("blanked", note="latents are returned")
        for guard, session in blocking:
            answers = guard._answers
            if not latents or answers.word == "callback":
                own = preview if answers.previews else None
                answer = answers.instead(self._told_of(row, blank, own, session))
                found = found if answer is None else answer
        return found

    def _preview(self, row: int, blank: Any) -> Any:
        """The blur of an image, by whichever guard has seen it; None where none has."""
        grids = [session.previews.get(row) for session in self.sessions]
        return blurred(next((grid for grid in grids if grid is not None), None), blank)

    def _told_of(self, row: int, blank: Any, preview: Any, session: Session) -> Blocked:
        prompts, generator = session.prompts, self._argument("generator")
        return Blocked(
            row,
            session.verdicts[row],
            blank,
            preview,
            prompts[row] if row < len(prompts) else None,
            seed_of(generator, row),
            CallRecord.of(self.sessions),
        )

    def told(self) -> None:
        """Let the sessions know what became of the images."""
        for session in self.sessions:
            session.tell(self.outcomes)

    # -- generations that take the place of others --------------------------------------------

    def wanted(self) -> dict[int, int]:
        """How often each blocked image is to be generated anew: all guards that block it say so."""
        found = {}
        for row in self._blocked():
            most = min(guard._answers.retries for guard, _ in self._blocking(row))
            if most:
                found[row] = most
        return found

    def by_guard(self) -> dict[LatentGuard, Session]:
        """The sessions by their guards."""
        return dict(zip(self.guards, self.sessions, strict=True))

    @property
    def interrupted(self) -> bool:
        """Whether the caller has ended the loop early, and so wants no other one."""
        return bool(getattr(self.pipe, "interrupt", False)) and not self._left

    def count_in(self, output: Any) -> int | None:
        """How many images an output has, None where that is not plain."""
        return outputs.count_of(output)

    def merged(self, output: Any, made: Any, rows: Sequence[int]) -> Any:
        """An output with some images, and what is flagged in them, of another one."""
        cls = outputs.output_class(self.pipe)
        return outputs.with_rows(output, made, rows, self.count, cls)

    def allows(self, row: int) -> bool:
        """Whether every guard has judged an image to its end, and none has blocked it."""
        verdicts = [session.verdicts[row] for session in self.sessions]
        return bool(verdicts) and all(
            verdict.decision != "block" and verdict.error is None for verdict in verdicts
        )

    def tried(self, row: int, seed: int | None) -> Attempt:
        """What is told of an image of this call, which repeats another one."""
        blocking = [session for _, session in self._blocking(row)]
        verdict = CallRecord.of(blocking or self.sessions).verdicts[row]
        return Attempt(seed, verdict, verdict.error)

    def _judged_latents(self, images: Tensor) -> Tensor:
        if self._is_judged(images):
            return images
        assert self._space is not None
        assert self._layout is not None
        judged = self._judge_end(self._read(images))
        if not self._layout.forms[0].fits(images.shape, self._space.channels):
            # FLUX.2's pipelines differ in whether they give back scaled latents or raw ones.
            raw = Latents(judged.to_spatial().tensor, self._space, scaled=False)
            judged = self._judge_end(raw)
        return self._written(judged, images)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a step, those that are judged as their plain bytes."""
    judged = ("latents", "denoised")
    return {
        name: plain(value) if name in judged and isinstance(value, Tensor) else value
        for name, value in values.items()
    }
