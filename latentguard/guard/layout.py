"""What a diffusers pipeline's `latents` are: their space, and the form that they have."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from latentguard.errors import GuardError, LatentsError
from latentguard.guard.forms import (
    CHANNELS_LAST,
    FRAMED,
    SPATIAL,
    Form,
    Size,
    patches,
    tokens,
    tokens_by_cell,
)
from latentguard.guard.numbers import Numbers
from latentguard.guard.tensors import laid_out_as
from latentguard.spaces import BatchNorm, Latents, LatentSpace


def space_of(pipe: Any, given: LatentSpace | str | None = None) -> LatentSpace:
    """The latent space of a pipeline: what its VAE says, with the VAE's own numbers, or `given`.

    Raises GuardError, naming the pipeline, where it cannot be known, and where `given` is another
    than the VAE's or is scaled in another way.
    """
    vae = getattr(pipe, "vae", None)
    name = type(pipe).__name__
    config = getattr(vae, "config", None)
    told: LatentSpace | LatentsError | None = None
    if config is not None and not is_tiny(vae):
        try:
            told = _as_scaled(pipe, LatentSpace.from_vae_config(config, classes_of(vae)))
        except LatentsError as error:
            told = error
    if given is not None:
        space = LatentSpace.get(given)
        if isinstance(told, LatentSpace) and told.name != space.name:
            raise GuardError(
                f"space is given as {space}, but the VAE of this {name} is of {told} latents: "
                "leave space out"
            )
        if isinstance(told, LatentSpace) and not told.is_scaled_as(space):
            raise GuardError(
                f"space is given as {space} with scale {space.scale} and shift {space.shift}, but "
                f"the VAE of this {name} has scale {told.scale} and shift {told.shift}: leave "
                "space out"
            )
        if config is not None and isinstance(told, LatentsError):
            _check_given(space, config, name)
        return _complete(space, pipe)
    if isinstance(told, LatentSpace):
        return _complete(told, pipe)
    if told is not None:
        raise GuardError(f"{name}: {told}") from told
    if config is None:
        raise GuardError(f"{name} has no VAE that tells its latent space: give space=...")
    return _by_class(pipe)


def classes_of(vae: Any) -> list[str]:
    """The names of a VAE's class and of its parents, by which some spaces are told."""
    return [cls.__name__ for cls in type(vae).__mro__]


def _as_scaled(pipe: Any, space: LatentSpace) -> LatentSpace:
    """The space of a pipeline's VAE with the scaling that the pipeline denoises in."""
    return replace(space, shift=0.0) if _by_name(pipe, _UNSHIFTED) else space


def numbers_of(pipe: Any, config: Mapping[str, Any]) -> Numbers | None:
    """The numbers of its VAE's config that a pipeline scales by."""
    numbers = Numbers.of(config)
    if numbers is None or not _by_name(pipe, _UNSHIFTED):
        return numbers
    return replace(numbers, shift=None)


def _check_given(space: LatentSpace, config: Mapping[str, Any], name: str) -> None:
    """Raises GuardError where the config of a VAE that is not known denies the space given."""
    channels = config.get("latent_channels", config.get("z_dim"))
    if isinstance(channels, int) and channels != space.channels:
        raise GuardError(
            f"space is given as {space} of {space.channels} channels, but the VAE of this {name} "
            f"has latents of {channels} channels: give the space of that VAE"
        )
    own = Numbers.of(config)
    if own is not None and own.mean is not None and not own.scale_as(space):
        raise GuardError(
            f"space is given as {space}, but the VAE of this {name} has a latents_mean and "
            f"latents_std that are not those of {space}: give the space of that VAE"
        )


def is_tiny(vae: Any) -> bool:
    """Whether a VAE is an AutoencoderTiny, which decodes several spaces."""
    return type(vae).__name__ == "AutoencoderTiny" or "latent_magnitude" in vae.config


def _complete(space: LatentSpace, pipe: Any) -> LatentSpace:
    """FLUX.2's statistics are buffers of its VAE."""
    vae = getattr(pipe, "vae", None)
    if space.scale is not None or not hasattr(vae, "bn"):
        return space
    told = BatchNorm.from_vae(vae)
    mean, variance = (by_channel(pipe, torch.tensor(values)) for values in (told.mean, told.var))
    return space.with_batch_norm(mean, variance, batch_norm_eps(pipe, told.eps))


def batch_norm_eps(pipe: Any, told: float) -> float:
    """The epsilon that a pipeline normalizes with, where its VAE tells another."""
    own = _by_name(pipe, _EPS)
    return told if own is None else float(own)


def by_channel(pipe: Any, values: Tensor) -> Tensor:
    """Statistics of packed channels [C * 4], in the pipeline's own order, as c*4 + dy*2 + dx."""
    form = _by_name(pipe, _DECLARED)
    if form is None or not isinstance(form, Form) or form.pattern != tokens_by_cell(2).pattern:
        return values
    return values.view(form.patch, form.patch, -1).permute(2, 0, 1).flatten()


def _by_class(pipe: Any) -> LatentSpace:
    # An AutoencoderTiny does not say whose latents it decodes; the pipeline's class does.
    for cls in type(pipe).__mro__:
        space = LatentSpace.of_pipeline(cls.__name__)
        if space is not None:
            return space
    raise GuardError(
        f"{type(pipe).__name__} decodes with an AutoencoderTiny, which does not say which latents "
        "these are: give space=..."
    )


# Pipelines that have no functions which pack their latents, and do not hold them as [B, C, H, W].
_DECLARED = (
    (r"^Ideogram4", tokens_by_cell(2)),
    (r"^ErnieImage", patches(2)),
    (r"^Kandinsky5T2I", CHANNELS_LAST),
)
# Pipelines that do not add the shift_factor of their VAE before they decode.
_UNSHIFTED = ((r"^Kandinsky5", True),)
# Pipelines that normalize with an epsilon of their own.
_EPS = ((r"^ErnieImage", 1e-5),)
# Pipelines whose latents are not the image's alone, or show it at no step.
_NO_IMAGE = (
    (r"^StableDiffusionPanorama", "denoises its latents in overlapping views"),
    (r"^VisualCloze", "denoises its input images with the image that it makes"),
    (r"^QwenImageLayered", "denoises several layers of an image at once"),
    (r"^JoyImageEdit", "denoises its input images with the image that it makes"),
    (r"^Kandinsky5I2I", "denoises its input image with the image that it makes"),
    (r"^HunyuanImageRefiner", "orders the channels of its latents anew before it decodes them"),
    (r"^Cosmos2TextToImage", "rescales its latents by its scheduler before it decodes them"),
)

_INSTEAD = "use output_type='latent' and Scorer with latents whose layout you know"


@dataclass(frozen=True)
class Layout:
    """How tensors of a pipeline hold latents of a space.

    forms: those that its `latents` may have; the first that fits counts.
    """

    space: LatentSpace
    forms: tuple[Form, ...]

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor can be latents of this layout by its shape, of whatever size."""
        return any(form.fits(tensor.shape, self.space.channels) for form in self.forms)

    def read(self, tensor: Tensor, pixels: Size | None, scaled: bool = True) -> Latents:
        """Latents with their convention; those that are packed as their space does stay packed.

        pixels: height and width of the image in pixels, which tokens do not carry.
        Raises LatentsError for a tensor of another shape.
        """
        form, size = self._form(tensor, self._sizes(pixels))
        if form == SPATIAL:
            return Latents(tensor, self.space, scaled)
        if form == _own(self.space) and size is not None:
            return Latents(tensor, self.space, scaled, "packed", *size)
        return Latents(form.spatial(tensor, self.space.channels, size), self.space, scaled)

    def written(self, latents: Latents, like: Tensor) -> Tensor:
        """The inverse of `read`: in the form, dtype and strides of a tensor that was read."""
        form, _ = self._form(like, lambda _: [(latents.height, latents.width)])
        if form == (SPATIAL if latents.layout == "spatial" else _own(self.space)):
            return laid_out_as(latents.tensor, like)
        return laid_out_as(form.restored(latents.to_spatial().tensor), like)

    def _sizes(self, pixels: Size | None) -> Callable[[Form], list[Size]]:
        """The sizes in cells that an image may have in a form: pipelines round both sides down to
        whole patches, or to an even number of cells."""

        def sizes(form: Form) -> list[Size]:
            if pixels is None:
                return []
            steps = dict.fromkeys((form.patch, 2))
            return [
                (step * (pixels[0] // (step * factor)), step * (pixels[1] // (step * factor)))
                for step in steps
            ]

        factor = self.space.vae_scale_factor
        return sizes

    def _form(
        self, tensor: Tensor, sizes: Callable[[Form], list[Size]]
    ) -> tuple[Form, Size | None]:
        channels, unsized = self.space.channels, False
        for form in self.forms:
            if not form.fits(tensor.shape, channels):
                continue
            if form.tells_size:
                return form, None
            for size in sizes(form):
                if form.fits(tensor.shape, channels, size):
                    return form, size
            unsized = True
        if unsized:
            raise LatentsError(
                f"packed latents {list(tensor.shape)} cannot be read: the pipeline gave no size "
                "for them, or another one"
            )
        raise LatentsError(
            f"latents of space {self.space} must have {channels} channels in the form "
            f"{' or '.join(map(str, self.forms))}, got {list(tensor.shape)}"
        )


def decoded_layout(space: LatentSpace) -> Layout:
    """What a VAE decodes: one image each, with or without an axis of frames."""
    return Layout(space, (SPATIAL, FRAMED))


def check_readable(pipe: Any) -> None:
    """Raises GuardError for a pipeline no step of which shows an image by itself."""
    why = _by_name(pipe, _NO_IMAGE)
    if why is None and _has(pipe, "get_views"):
        why = "denoises its latents in overlapping views"
    if why is not None:
        raise GuardError(
            f"{type(pipe).__name__} {why}, and no step shows a whole image by itself, so it cannot "
            f"be guarded while it denoises: {_INSTEAD}"
        )


def layout_of(pipe: Any, space: LatentSpace) -> Layout:
    """How a pipeline's `latents` hold those of its space.

    Its own functions are tried on numbers that are all different; where it has none, its class is
    one of those that are known, or its latents are spatial.

    Raises GuardError for a pipeline whose latents are not known to be read rightly.
    """
    check_readable(pipe)
    name = type(pipe).__name__
    declared = _by_name(pipe, _DECLARED)
    if declared is not None:
        return Layout(space, (declared, SPATIAL))
    if not _has(pipe, "_pack_latents"):
        # All that a space without packing has is spatial.
        if space.packed_patch > 1 and not _sized(pipe):
            raise GuardError(
                f"{name} is not known to hold latents of space {space} as [B, C, H, W] or to pack "
                "them (told by its prepare_latents, _pack_latents and _unpack_latents), so what "
                f"they show cannot be read while it denoises: {_INSTEAD}"
            )
        return Layout(space, (SPATIAL,))
    packed = tuple(
        form
        for form, pack, unpack in _packing_functions(pipe)
        if _agrees(pipe, space, form, pack, unpack)
    )
    if not packed:
        raise GuardError(
            f"{name} is not known to pack its latents into tokens of channels, rows and columns "
            "(told by its _pack_latents and _unpack_latents on numbers that are all different), so "
            f"what they show cannot be read while it denoises: {_INSTEAD}"
        )
    return Layout(space, (*packed, SPATIAL))


def pixels_in(arguments: Mapping[str, Any]) -> Size | None:
    """Height and width among the arguments of a pipeline's functions."""
    height, width = arguments.get("height"), arguments.get("width")
    if isinstance(height, Integral) and isinstance(width, Integral):  # NumPy's, too
        return int(height), int(width)
    return None


def _own(space: LatentSpace) -> Form | None:
    """The form in which `Latents` of a space are packed."""
    known = {"c dy dx": tokens, "dy dx c": tokens_by_cell}
    form = known.get(str(space.packed_order))
    return None if form is None else form(space.packed_patch)


def _by_name(pipe: Any, table: tuple[tuple[str, Any], ...]) -> Any:
    """What a table says of a pipeline's class, or of one that it is derived from."""
    for cls in type(pipe).__mro__:
        for pattern, value in table:
            if re.match(pattern, cls.__name__):
                return value
    return None


def _has(pipe: Any, name: str) -> bool:
    return hasattr(type(pipe), name)


def _sized(pipe: Any) -> bool:
    """Whether `prepare_latents` makes latents of a height and width."""
    prepare = getattr(type(pipe), "prepare_latents", None)
    return prepare is not None and {"height", "width"} <= set(inspect.signature(prepare).parameters)


def _packing_functions(pipe: Any) -> list[tuple[Form, str, str]]:
    """Forms of tokens with the functions of a pipeline that would make and undo them."""
    found = [(tokens(patch), "_pack_latents", "_unpack_latents") for patch in (2, 1)]
    if _has(pipe, "_pack_latents_no_patch"):
        found.append((tokens(1), "_pack_latents_no_patch", "_unpack_latents_no_patch"))
    return found


def _agrees(pipe: Any, space: LatentSpace, form: Form, pack: str, unpack: str) -> bool:
    """Whether a pipeline's functions make just this form, and undo it."""
    rows, columns = 4, 6  # of which some pipelines want even numbers
    probe = torch.arange(float(space.channels * rows * columns))
    probe = probe.view(1, space.channels, rows, columns)
    packed = form.restored(probe)
    try:
        return torch.equal(_packed_by(pipe, getattr(pipe, pack), form, probe), packed) and (
            torch.equal(_unpacked_by(pipe, unpack, space, form, probe), probe)
        )
    except Exception:  # of functions that want or give something else
        return False


def _packed_by(pipe: Any, function: Callable[..., Tensor], form: Form, probe: Tensor) -> Tensor:
    given = {
        "latents": probe,
        "batch_size": 1,
        "num_channels_latents": probe.shape[1],
        "height": probe.shape[2],
        "width": probe.shape[3],
        "patch_size": form.patch,
    }
    names = list(inspect.signature(function).parameters)
    if names == ["latents"]:  # FLUX.2's, which get patches
        given["latents"] = pipe._patchify_latents(probe)
    return function(**{name: given[name] for name in names})


def _unpacked_by(pipe: Any, name: str, space: LatentSpace, form: Form, probe: Tensor) -> Tensor:
    """What a pipeline makes of tokens of the probe: [1, C, H, W], its axis of frames left out."""
    packed = form.restored(probe)
    if not _has(pipe, name):  # FLUX.2's, which unpack by the tokens' own positions
        grid = patches(form.patch).restored(probe)
        unpacked: Tensor = pipe._unpatchify_latents(grid)
        return unpacked
    given = {
        "latents": packed,
        "height": probe.shape[2] * space.vae_scale_factor,
        "width": probe.shape[3] * space.vae_scale_factor,
        "patch_size": form.patch,
        "vae_scale_factor": int(pipe.vae_scale_factor),
    }
    function = getattr(pipe, name)
    unpacked = function(**{key: given[key] for key in inspect.signature(function).parameters})
    return unpacked.squeeze(2) if unpacked.ndim == 5 else unpacked
