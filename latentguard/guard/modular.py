"""One guarded call of a diffusers modular pipeline: what its guard blocks report to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from torch import Tensor

from latentguard.errors import GuardError, LatentsError
from latentguard.guard import output as outputs
from latentguard.guard.attachment import holds_guard
from latentguard.guard.blocks import (
    NAME,
    check_complete,
    find,
    form_of,
    guards_in_blocks,
)
from latentguard.guard.call import GuardedCall, Stop
from latentguard.guard.components import wrap_components
from latentguard.guard.forms import FRAMED, SPATIAL, Form, patches
from latentguard.guard.layout import Layout, pixels_in
from latentguard.guard.output import GenerationBlocked
from latentguard.guard.record import CallRecord
from latentguard.guard.retry import Again, Draws, retried
from latentguard.guard.running import INTO_BLOCKS, current
from latentguard.guard.tensors import private
from latentguard.spaces import LatentSpace

if TYPE_CHECKING:
    from latentguard.denoised import StepCall
    from latentguard.guard.adapter import LatentGuard


def run(original: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    """What a modular pipeline's `__call__` does once latentguard is imported."""
    values = [*args, *kwargs.values()]
    states = [value.values for value in values if isinstance(value, PipelineState)]
    if holds_guard([*values, *states]):
        raise GuardError(f"{type(pipe).__name__} takes no LatentGuard in a call: {INTO_BLOCKS}")
    guards = guards_in_blocks(pipe._blocks)
    if not guards:
        return original(pipe, *args, **kwargs)
    for guard in guards:
        guard._forget()
    check_complete(pipe._blocks)
    bound = inspect.signature(original).bind(pipe, *args, **kwargs).arguments
    wanted = bound.get("output")
    if not (wanted is None or isinstance(wanted, str | list | tuple)):
        raise ValueError(f"output must be None, a name or a list of names, got {wanted!r}")
    state = _generated(original, pipe, guards, bound.get("state"), bound.get("kwargs", {}))
    return state if wanted is None else state.get(wanted)


def _generated(
    original: Callable[..., Any],
    pipe: Any,
    guards: list[LatentGuard],
    state: Any,
    inputs: dict[str, Any],
) -> Any:
    """The state that a call ends with, what is blocked in it generated anew where a guard asks."""
    call, draws = GuardedBlocksCall(pipe, guards), None
    if any(guard._answers.retries for guard in guards):
        known = {**({} if state is None else state.values), **inputs}
        taken = "generator" in pipe._blocks.input_names
        generator, latents = known.get("generator"), known.get("latents")
        draws = Draws(generator, latents, pipe._execution_device, taken)

    def repeat(again: Again, generator: Any) -> tuple[GuardedCall, Any]:
        other = GuardedBlocksCall(pipe, guards, again)
        return other, other.run_blocks(original, state, {**inputs, "generator": generator})

    try:
        ended = call.run_blocks(original, state, inputs)
        if draws is None:
            return ended
        ended = retried(call, ended, draws, repeat)
        ended.set(NAME, CallRecord.of(call.sessions))
        return ended
    finally:
        call.end()


class GuardedBlocksCall(GuardedCall):
    """A running call of a modular pipeline: a GuardedCall that its blocks report to.

    Raises LatentsError where a guard cannot judge this pipeline, with the components it has now.
    """

    def __init__(self, pipe: Any, guards: list[LatentGuard], again: Again | None = None) -> None:
        self._blocks = pipe._blocks
        super().__init__(pipe, inspect.Signature(), {}, guards, [], again)
        self._state: Any = None  # once a block of the guard has seen it
        self._before: dict[str, Any] = {}  # what was in it then
        self._steps: int | None = None

    def _layout_in(self, space: LatentSpace) -> Layout:
        form = form_of(self._blocks)
        if form == SPATIAL:
            return Layout(space, (SPATIAL,))
        layout = Layout(space, (form, SPATIAL, patches(form.patch), FRAMED))
        self._check_unpacking(space, form)
        return layout

    def _check_unpacking(self, space: LatentSpace, form: Form) -> None:
        """Raises LatentsError unless blocks after the loops undo just this form: they are tried on
        numbers that are all different."""
        found = find(self._blocks)
        undone = {
            type(block).__name__: _undoes(block, self.pipe, space, form)
            for _, block in found.unpackers
        }
        if found.loops and (False in undone.values() or True not in undone.values()):
            raise LatentsError(
                f"no block after the loop of this {type(self.pipe).__name__} is known to unpack "
                f"tokens of the form {form} ({', '.join(undone) or 'none is there'}), so what the "
                "loop's latents show cannot be read: keep the loop and the block that unpacks its "
                "latents together, or use latentguard.guard.session in a loop of your own"
            )

    # -- the call ----------------------------------------------------------------------------

    def run_blocks(self, original: Callable[..., Any], state: Any, inputs: dict[str, Any]) -> Any:
        """Call the pipeline, and return the state that it ends with, as far as it may be seen."""
        for guard in self.guards:
            guard._prepare_blocks(self.pipe)
        wrap_components(self.pipe)
        token = current.set(self)
        try:
            try:
                with self.entering(original):
                    state = original(self.pipe, state=state, **inputs)
                self._finish_state(state)
            except Stop:
                state = self._state
                self._withhold(state)
        finally:
            current.reset(token)
            self._keep()
        return state

    # -- what the blocks report ----------------------------------------------------------------

    def before_blocks(self, state: Any, decodes: bool) -> None:
        """A loop, or a decoder, is about to run on a state."""
        if self._state is None:
            self._before = dict(state.values)
        self._state, self._arguments = state, state.values
        self._pixels = pixels_in(state.values) or self._pixels
        wrap_components(self.pipe)  # blocks may exchange some
        latents = state.get("latents")
        if not decodes:
            self.saw_first(latents)
        elif isinstance(latents, Tensor):
            state.set("latents", self._before_decoder(private(latents)))
            if self._all_blocked():
                self._stop(self.pipe, latents)

    def after_step(self, block_state: Any, index: int, timestep: Any) -> None:
        """A step of a loop has ended, and left its latents in the loop's state."""
        if self._state is None:
            raise LatentsError(
                "a guarded loop runs without the guard's block before it: put the guard in last, "
                "by guard.into(blocks), after all other changes"
            )
        wrap_components(self.pipe)
        timesteps = getattr(block_state, "timesteps", None)
        self._steps = None if timesteps is None else len(timesteps)
        values = self.callback(self.pipe, index, timestep, {"latents": block_state.latents})
        block_state.latents = values["latents"]

    def _ends(self, pipe: Any, index: int, seen: StepCall | None) -> bool:
        return index + 1 == self._steps or super()._ends(pipe, index, seen)

    def _before_decoder(self, latents: Tensor) -> Tensor:
        """The latents, with zeros for images that are blocked; those that nobody has judged as
        final are judged here."""
        if self._is_judged(latents):
            return latents
        judged = self._judge_end(self._read(latents))
        self._judged = judged.to(latents.dtype, copy=True)
        return self._written(judged, latents)

    # -- the end -----------------------------------------------------------------------------

    def _stop(self, pipe: Any, latents: Tensor) -> None:
        """Every image is blocked: leave the pipeline where the form of its blanks is known."""
        images = self._blanks(latents)
        if not find(self._blocks).decoders or images is not None:
            self._state.set("latents", torch.zeros_like(latents))
            if images is not None:
                self._state.set("images", images)
            raise Stop

    def _blanks(self, latents: Tensor) -> Any:
        """Blank images in the form that the call asks for; None where it is not known."""
        form = self._argument("output_type")
        # An image that was cropped for inpainting is put back into the whole of it.
        if form == "latent" or self._argument("padding_mask_crop") is not None:
            return None
        read = self._read(latents)
        height, width = (side * read.space.vae_scale_factor for side in (read.height, read.width))
        return outputs.blanks(len(read), height, width, str(form))

    def _finish_state(self, state: Any) -> None:
        """Take blocked images out of the state that the pipeline ended with."""
        for name, value in self._latents_in(state):
            state.set(name, self._judged_latents(private(value)))
        images = state.get("images")
        if images is not None:
            told = self._argument("output_type") == "latent" and self._is_latents(images)
            given, images, are_latents = self._with_judged_latents({"images": images}, told)
            state.set("images", given["images"])
            unseen = not are_latents and not self._decoded
            for session in self.sessions:
                if not session.stopped and (unseen or not session.finished):
                    session.fail("what was decoded was never seen", final=True)
        if not self.sessions:
            raise LatentsError(
                f"{type(self.pipe).__name__} returned without a single step or decoded latent that "
                "could be judged, so what it returned is withheld"
            )
        self._withhold(state)

    def _latents_in(self, state: Any) -> list[tuple[str, Tensor]]:
        """What a state has in the form of latents, under whatever name: blocks may hand on what
        they like. What was there before the loop is the caller's own."""
        found = []
        for name, value in state.values.items():
            if not isinstance(value, Tensor) or name == "images":
                continue
            new = value is not self._before.get(name)
            if name == "latents" or (new and self._is_latents(value)):
                found.append((name, value))
        return found

    def _is_latents(self, value: Any) -> bool:
        """Whether a value may be latents by its form."""
        return (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and self._layout is not None
            and self._layout.fits(value)
        )

    def _withhold(self, state: Any) -> None:
        """Put blanks where images are blocked, or what guards give instead, and say why."""
        blocked, images = self._blocked(), state.get("images")
        if blocked and images is not None:
            verdicts = [session.verdicts for session in self.sessions if session.blocked]
            images = outputs.blanked(images, blocked, verdicts)
            state.set("images", images)
        try:
            latents = self._argument("output_type") == "latent" and self._is_latents(images)
            given = self._answered({"images": images}, images, latents)
        except GenerationBlocked as error:
            error.output = state
            raise
        finally:
            state.set(NAME, CallRecord.of(self.sessions))
        if blocked and images is not None:
            state.set("images", given["images"])

    def count_in(self, output: Any) -> int | None:
        """How many images, or latents, a state has."""
        images = output.get("images")
        return outputs.count_of(output.get("latents") if images is None else images)

    def merged(self, output: Any, made: Any, rows: Sequence[int]) -> Any:
        """A state with some images and latents of another one."""
        for name in ("images", "latents"):
            here, there = output.get(name), made.get(name)
            if here is not None and there is not None and len(here) == len(there) == self.count:
                output.set(name, outputs.replaced(here, rows, there.__getitem__))
        return output


def _undoes(block: Any, pipe: Any, space: LatentSpace, form: Form) -> bool | None:
    """Whether a block makes [B, C, H, W] of tokens, or patches of them, or a single frame.

    None for a block that leaves tokens as they are, or does not take them.
    """
    rows, columns = 2 * form.patch, 3 * form.patch
    probe = torch.arange(float(space.channels * rows * columns)).view(1, -1, rows, columns)
    packed, factor = form.restored(probe), int(pipe.vae_scale_factor)
    grid = map(torch.arange, (1, rows // form.patch, columns // form.patch, 1))
    state = PipelineState()
    state.set("latents", packed)
    state.set("height", rows * factor)
    state.set("width", columns * factor)
    state.set("latent_ids", torch.cartesian_prod(*grid)[None])
    try:
        unpacked = block(pipe, state)[1].get("latents")
    except Exception:  # of blocks that want or give something else
        return None
    if not isinstance(unpacked, Tensor) or unpacked.shape == packed.shape:
        return None
    known = (SPATIAL, FRAMED, patches(form.patch))
    return any(torch.equal(unpacked, other.restored(probe)) for other in known)
