"""Guards as blocks of diffusers' modular pipelines: where they go, and whether they are all there.

`guarded_blocks` puts a `GuardBlock` at the end of each denoising loop, and a `BeforeBlock` before
each loop and each decoder. They only report to the guarded call that runs (modular.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffusers.modular_pipelines.modular_pipeline import (
    ConditionalPipelineBlocks,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from latentguard.errors import GuardError
from latentguard.guard.forms import SPATIAL, Form, tokens
from latentguard.guard.record import CallRecord
from latentguard.guard.running import INTO_BLOCKS, Marked, current

if TYPE_CHECKING:
    from latentguard.guard.adapter import LatentGuard

NAME = "latentguard"
"""The name of the guards' blocks, and of the record in the state that a call returns."""

# How loops hold their latents, by what their blocks call their model.
_FORMS: dict[str, Form] = {
    "stable-diffusion-xl": SPATIAL,
    "stable-diffusion-3": SPATIAL,
    "z-image": SPATIAL,
    "flux": tokens(2),
    "flux-kontext": tokens(2),
    "flux2": tokens(2),
    "flux2-klein": tokens(2),
    "qwenimage": tokens(2),
    "qwenimage-edit": tokens(2),
}


class _Block(ModularPipelineBlocks):
    """A block that holds guards and reports to the guarded call."""

    def __init__(self, *guards: LatentGuard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not guards or not all(isinstance(guard, Marked) for guard in guards):
            found = ", ".join(type(guard).__name__ for guard in guards) or "nothing"
            raise GuardError(f"{type(self).__name__} takes one LatentGuard or more, got {found}")
        vars(self)["guards"] = guards

    def _call(self, pipe: Any) -> Any:
        """The guarded call of a pipeline that runs. Raises LatentsError where none does."""
        call = current.get()
        if call is None or call.pipe is not pipe or not hasattr(call, "before_blocks"):
            raise GuardError(
                f"guarded blocks were called by themselves on a {type(pipe).__name__}, so nobody "
                "would see what they return: make a pipeline of them (init_pipeline) and call that"
            )
        return call


class GuardBlock(_Block):
    """The last block of a denoising loop: the latents that it leaves are judged.

    Put in by `LatentGuard.into` or `guarded_blocks`, which put in what belongs with it too.
    """

    @property
    def description(self) -> str:
        return "Judges the latents after each step, and steers or blocks as the policy says."

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("latents", description="The latents as the guard leaves them")]

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> tuple[Any, Any]:
        self._call(components).after_step(block_state, i, t)
        return components, block_state


class BeforeBlock(_Block):
    """The block before a denoising loop, which tells the guarded call the state that it runs on,
    or before a decoder: what that is given is compared with what was judged."""

    def __init__(self, *guards: LatentGuard, decodes: bool = False) -> None:
        super().__init__(*guards)
        self.decodes = decodes

    @property
    def description(self) -> str:
        what = "what is decoded" if self.decodes else "the denoising loop"
        return f"Where the guard begins with {what}."

    @property
    def inputs(self) -> list[Any]:
        return [InputParam("latents", required=True)]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [
            OutputParam(NAME, type_hint=CallRecord, description="What the guard said of this call")
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        self._call(components).before_blocks(state, self.decodes)
        return components, state


@dataclass
class Found:
    """What is in a tree of blocks, each with where it stands, such as denoise.denoise.

    loops, decoders: that the guard has to be in. unpackers: blocks after a loop that may
        make a grid of tokens. others: blocks after a loop that have the VAE and are no decoder.
    """

    loops: list[tuple[str, Any]] = field(default_factory=list)
    decoders: list[tuple[str, Any]] = field(default_factory=list)
    unpackers: list[tuple[str, Any]] = field(default_factory=list)
    others: list[tuple[str, Any]] = field(default_factory=list)
    takes_scheduler: bool = False


def guarded_blocks(blocks: Any, guard: LatentGuard) -> Any:
    """A copy of a modular pipeline's blocks with a guard in each denoising loop and each decoder.

        pipe = guarded_blocks(blocks, guard).init_pipeline(...)

    blocks: of a whole pipeline, or of a part that denoises or decodes. Where they have guards
        already, these stay and judge first.

    Raises LatentsError where the blocks have no loop or no decoder that is known as one, and where
    the form of the loop's latents is not known.
    """
    if isinstance(blocks, type) and issubclass(blocks, ModularPipelineBlocks):
        blocks = blocks()
    if not isinstance(blocks, ModularPipelineBlocks):
        raise GuardError(
            "a guard goes into ModularPipelineBlocks, and this is a "
            f"{type(blocks).__name__}: {INTO_BLOCKS}"
        )
    bare = _without_guards(copy.deepcopy(blocks))
    form_of(bare)
    guards = tuple(dict.fromkeys([*guards_in_blocks(blocks), guard]))
    return _with_guards(bare, guards)


def guards_in_blocks(blocks: Any) -> list[LatentGuard]:
    """The guards in a tree of blocks, each once."""
    found = [guard for _, block in _leaves(blocks) for guard in getattr(block, "guards", ())]
    return list(dict.fromkeys(found))


def check_complete(blocks: Any) -> None:
    """Raises LatentsError where some loop or decoder has not the guards that others have.

    Blocks may be taken out, put in and exchanged after `guarded_blocks`.
    """
    guards = guards_in_blocks(blocks)
    for path, block, before in _with_neighbors(blocks):
        wanted: list[tuple[str, Any]] = []
        if _is_loop(block):
            last = next(reversed(block.sub_blocks.values()), None)
            wanted = [("last in", last if isinstance(last, GuardBlock) else None)]
            wanted.append(("before", before))
        elif _is_decoder(block):
            right = isinstance(before, BeforeBlock) and before.decodes
            wanted = [("before", before if right else None)]
        for where, found in wanted:
            if list(getattr(found, "guards", ())) != guards:
                raise GuardError(
                    f"these blocks are guarded, but no block of the guard stands {where} "
                    f"'{path}' ({type(block).__name__}), so what that makes would not be judged: "
                    "put the guard in last, by guard.into(blocks), after all other changes"
                )


def form_of(blocks: Any) -> Form:
    """The form of the latents in the loops of blocks, or of what their decoders are given.

    Raises LatentsError for blocks that a guard cannot be put into.
    """
    found = find(blocks)
    name = type(blocks).__name__
    if not found.loops and (found.takes_scheduler or not found.decoders):
        raise GuardError(
            f"no denoising loop was found in these {name} (a LoopSequentialPipelineBlocks with a "
            "block that has the scheduler and one that gives the latents), so nothing would be "
            f"judged: {_INSTEAD}"
        )
    forms: dict[str, Form] = {}
    for path, block in found.loops or found.decoders:
        if block.model_name not in _FORMS:
            raise GuardError(
                f"the form of the latents of '{path}' ({type(block).__name__}, of model "
                f"'{block.model_name}') is not known; known are those of models "
                f"{', '.join(_FORMS)}: {_INSTEAD}"
            )
        forms[block.model_name] = _FORMS[block.model_name]
    if found.others:
        path, block = found.others[0]
        raise GuardError(
            f"'{path}' ({type(block).__name__}) of these {name} has the VAE after the loop and is "
            "no decoder that is known (of the input latents and the output images), so what it "
            f"makes could not be blanked: {_INSTEAD}"
        )
    if len(set(forms.values())) > 1:
        raise GuardError(
            f"the loops of these {name} hold their latents in several forms ({', '.join(forms)}): "
            "put a guard into the blocks of each model"
        )
    return next(iter(forms.values()))


_INSTEAD = "use latentguard.guard.session in a loop of your own, or Scorer on its latents"


def find(blocks: Any) -> Found:
    """The loops and decoders in a tree of blocks, whatever guards are in it."""
    found = Found()
    _find(blocks, "", False, found)
    return found


def _find(block: Any, path: str, looped: bool, found: Found) -> bool:
    """Whether a loop may have run once this block has."""
    if isinstance(block, _Block):
        return looped
    here = (path or type(block).__name__, block)
    if block.sub_blocks and not isinstance(block, LoopSequentialPipelineBlocks):
        after = looped
        for name, inner in block.sub_blocks.items():
            seen = _find(inner, f"{path}.{name}" if path else name, after, found)
            # Of alternatives one runs, and none of them after another.
            after = seen if not isinstance(block, ConditionalPipelineBlocks) else looped
            looped = looped or seen
        return looped
    names = block.component_names
    found.takes_scheduler = found.takes_scheduler or "scheduler" in names
    if _is_loop(block):
        found.loops.append(here)
        return True
    if _is_decoder(block):
        found.decoders.append(here)
    elif looped and "vae" in names:
        found.others.append(here)
    elif looped and _unpacks(block):
        found.unpackers.append(here)
    return looped


def _is_loop(block: Any) -> bool:
    return (
        isinstance(block, LoopSequentialPipelineBlocks)
        and any("scheduler" in inner.component_names for inner in block.sub_blocks.values())
        and "latents" in {*block.input_names, *block.intermediate_output_names}
    )


def _is_decoder(block: Any) -> bool:
    return (
        not block.sub_blocks
        and "vae" in block.component_names
        and "latents" in block.input_names
        and "images" in block.intermediate_output_names
    )


def _unpacks(block: Any) -> bool:
    """Whether a block may make a grid of tokens, for which it needs a size or positions."""
    given = set(block.input_names)
    changes = "latents" in given and "latents" in block.intermediate_output_names
    return changes and bool({"height", "latent_ids"} & given)


def _leaves(block: Any) -> Iterator[tuple[str, Any]]:
    """Every block of a tree that has none within, those of loops too, with its name."""
    for name, inner in block.sub_blocks.items():
        yield from _leaves(inner) if inner.sub_blocks else [(name, inner)]
    if isinstance(block, _Block):
        yield NAME, block


def _with_neighbors(block: Any, path: str = "", before: Any = None) -> Iterable[Any]:
    """The path of each leaf or loop, the block itself, and the one just before it in a sequence."""
    if not block.sub_blocks or isinstance(block, LoopSequentialPipelineBlocks):
        yield path or type(block).__name__, block, before
        return
    last = None
    for name, inner in block.sub_blocks.items():
        yield from _with_neighbors(inner, f"{path}.{name}" if path else name, last)
        last = inner if isinstance(block, SequentialPipelineBlocks) else None


def _without_guards(block: Any) -> Any:
    """A tree of blocks, changed in place, without the blocks that guards have put in."""
    inner = block.sub_blocks
    for name, one in list(inner.items()):
        if isinstance(one, _Block):
            del inner[name]
        else:
            inner[name] = _without_guards(one)
    if isinstance(block, GuardedPart) and len(inner) == 1:
        return next(iter(inner.values()))
    return block


def _with_guards(block: Any, guards: tuple[LatentGuard, ...]) -> Any:
    """A tree of blocks, changed in place, with guards in each loop and decoder."""
    if _is_loop(block):
        block.sub_blocks[NAME] = GuardBlock(*guards)
        return GuardedPart.of(block, "denoise", BeforeBlock(*guards))
    if _is_decoder(block):
        return GuardedPart.of(block, "decode", BeforeBlock(*guards, decodes=True))
    if not isinstance(block, LoopSequentialPipelineBlocks):
        for name, inner in block.sub_blocks.items():
            block.sub_blocks[name] = _with_guards(inner, guards)
    return block


class GuardedPart(SequentialPipelineBlocks):
    """A loop or a decoder, and the block of the guard that stands before it."""

    @classmethod
    def of(cls, block: Any, name: str, before: BeforeBlock) -> Any:
        return cls.from_blocks_dict({NAME: before, name: block})

    @property
    def description(self) -> str:
        return str(next(reversed(self.sub_blocks.values())).description)
