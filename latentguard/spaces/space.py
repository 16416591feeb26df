"""LatentSpace: what the latents of a space are, and the exact conversions between raw and scaled.

Every space obeys `scaled = (raw - shift) * scale`: raw is what the VAE encodes and decodes, scaled
is what the diffusion model denoises. Factors are one number, one per channel, or (flux2) one per
channel of the 2x2 packing. Each shipped space is one file in `data/` (records.py).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from latentguard import plugins
from latentguard.deprecated import Former, former_keywords
from latentguard.errors import LatentsError
from latentguard.spaces import scaling
from latentguard.spaces.records import (
    MAX_CHANNELS,
    MAX_FACTOR,
    NAME,
    ORDERS,
    SCHEMA_VERSION,
    SUFFIXES,
    SpaceRecord,
    read_record,
    record_of,
    shipped_records,
)
from latentguard.spaces.rgb import RGB, RGBView
from latentguard.spaces.vae_config import space_from_vae_config

if TYPE_CHECKING:
    from torch import Tensor

Factors = float | tuple[float, ...]

CANONICAL = "c dy dx"
"""The order of indices in a token that most pipelines use: channel c*4 + dy*2 + dx."""


class BatchNorm(NamedTuple):
    """The batch-norm statistics of the FLUX.2 VAE, over its 128 packed channels.

    `mean` and `var` are the buffers `vae.bn.running_mean` and `vae.bn.running_var`, `eps` is
    `vae.config.batch_norm_eps` (1e-4 in diffusers).
    """

    mean: Sequence[float]
    var: Sequence[float]
    eps: float = 1e-4

    @classmethod
    def from_vae(cls, vae: Any) -> BatchNorm:
        """Read the statistics from a diffusers `AutoencoderKLFlux2` (anything with `.bn`)."""
        try:
            return cls(vae.bn.running_mean.tolist(), vae.bn.running_var.tolist(), float(vae.bn.eps))
        except AttributeError as error:
            raise LatentsError(
                f"{type(vae).__name__} has no batch-norm statistics (bn.running_mean, "
                "bn.running_var): pass the full FLUX.2 VAE"
            ) from error


@former_keywords(factor="vae_scale_factor")
@dataclass(frozen=True)
class LatentSpace:
    """One latent space: its shape, its two scalings, its packing and its RGB view.

    Attributes:
        name: small letters, digits, `.`, `-` and `_`, such as `sdxl` or `flux1`.
        channels: channels of the spatial layout [B, channels, H, W].
        scale, shift: `scaled = (raw - shift) * scale`; a number, `channels` numbers, or
            `packed_channels` numbers in the order c*4 + dy*2 + dx. They are finite and plausible by
            the statistics of images. None if the numbers are not constants of the
            space but statistics of a VAE (`statistics_of_vae`).
        rgb_view: the linear RGB view, about [-1, 1] at one pixel per cell, or None. It says whether
            it acts on scaled or raw latents.
        vae_scale_factor: pixels per latent cell, along both axes of a picture.
        packed_patch: 2 if the pipeline packs 2x2 cells into one token, else 1.
        mean, std: per-channel statistics of raw latents over natural images, or None. Files that do
            not state their space are recognized by them.
        temporal_factor: frames of a video per frame of latents; 1 in a space of images.
        packed_order: the order of channel (c), row (dy) and column (dx) in the channels of a token;
            the last one changes fastest. None if pipelines make no tokens. "c dy dx" is usual.
        statistics_of_vae: "batch_norm" or "mean_std" if `scale` and `shift` are buffers of the VAE:
            `bn.running_mean` and `bn.running_var`, or `latents_mean` and `latents_std`.

    Raises:
        LatentsError: an impossible value, or a name that another space has.
    """

    name: str
    channels: int
    scale: Factors | None
    shift: Factors | None = 0.0
    rgb_view: RGBView | None = None
    vae_scale_factor: int = 8
    packed_patch: int = 1
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    temporal_factor: int = 1
    packed_order: str | None = None
    statistics_of_vae: str | None = None

    factor = Former("vae_scale_factor")

    def __post_init__(self) -> None:
        if self.packed_order is None and self.packed_patch != 1:
            object.__setattr__(self, "packed_order", CANONICAL)
        for key in ("scale", "shift", "mean", "std"):
            object.__setattr__(self, key, _factors(self.name, key, getattr(self, key)))
        self._check()
        scaling.check_plausible(self)

    def __str__(self) -> str:
        return self.name

    def _check(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise LatentsError(
                "a latent space's name must be small letters, digits, '.', '-' and '_', got "
                f"{self.name!r:.60}"
            )
        limits = {
            "channels": MAX_CHANNELS,
            "vae_scale_factor": MAX_FACTOR,
            "temporal_factor": MAX_FACTOR,
            "packed_patch": 16,
        }
        for key, limit in limits.items():
            value = getattr(self, key)
            if type(value) is not int or not 1 <= value <= limit:
                raise LatentsError(
                    f"space {self.name}: {key} must be a whole number from 1 to {limit}, got "
                    f"{value!r:.60}"
                )
        if self.packed_order not in (None, *ORDERS):
            raise LatentsError(
                f"space {self.name}: packed_order must be {' or '.join(ORDERS)}, got "
                f"{self.packed_order!r:.60}"
            )
        view = self.rgb_view
        if view is not None and len(view.factors) != self.channels:
            raise LatentsError(
                f"space {self.name}: rgb_view must have {self.channels} factors of 3 numbers, got "
                f"{len(view.factors)}"
            )
        for key in ("mean", "std"):
            value = getattr(self, key)
            if value is not None and len(value) != self.channels:
                raise LatentsError(
                    f"space {self.name}: {key} must hold {self.channels} numbers, got {len(value)}"
                )
        known = SPACES.get(self.name)
        if known is not None and known._shape() != self._shape():
            raise LatentsError(
                f"space {self.name} is known with another shape ({known._shape_shown()}, not "
                f"{self._shape_shown()}): give your space a name of its own"
            )

    def _shape(self) -> tuple[int, ...]:
        return self.channels, self.vae_scale_factor, self.temporal_factor, self.packed_patch

    def _shape_shown(self) -> str:
        return (
            f"{self.channels} channels, factor {self.vae_scale_factor}, temporal factor "
            f"{self.temporal_factor}, patches of {self.packed_patch}"
        )

    @property
    def packed_channels(self) -> int:
        """Channels of one token of the packed layout (equal to `channels` without packing)."""
        return self.channels * self.packed_patch**2

    @property
    def packs(self) -> bool:
        """Whether this space has a packed layout [B, N, packed_channels]."""
        return self.packed_order is not None

    @property
    def rgb_factors(self) -> tuple[RGB, ...] | None:
        """`rgb_view.factors`; None without a view."""
        return None if self.rgb_view is None else self.rgb_view.factors

    @property
    def rgb_bias(self) -> RGB | None:
        """`rgb_view.bias`; None without a view."""
        return None if self.rgb_view is None else self.rgb_view.bias

    @property
    def standard(self) -> LatentSpace:
        """The space of this name with its usual scaling, on which models are trained.

        Self if no such space is known.
        """
        return SPACES.get(self.name, self)

    def check_standard(self, model: str) -> None:
        """Raise LatentsError where a model that is known by the space's name alone would misread
        plain arrays: this space has another scaling, or another order of tokens, than its name."""
        standard = self.standard
        if self.packed_order != standard.packed_order or not self.is_scaled_as(standard):
            raise LatentsError(
                f"{model} reads arrays as {standard} latents, and this space has another scaling "
                "or order of tokens: leave the space out, and give it with the latents "
                "(LatentArray(array, space, scaled), or a file that names it)"
            )

    # -- finding a space ---------------------------------------------------------------------

    @staticmethod
    def get(name: str | LatentSpace) -> LatentSpace:
        """The space of that name (a LatentSpace passes through). LatentsError lists the names.

        The names are those of the shipped spaces, of their other scalings, of spaces that were
        registered (`register`), and of spaces that installed packages bring.
        """
        if isinstance(name, LatentSpace):
            return name
        found = _known(name) if isinstance(name, str) else None
        if found is None:
            raise LatentsError(
                f"unknown latent space {name!r:.60}{guess(name)}: use one of "
                f"{', '.join(known_names())}, or a file of your own ({', '.join(SUFFIXES)})"
            )
        return found

    @staticmethod
    def of(given: str | Path | LatentSpace) -> LatentSpace:
        """The space for what an operator gives: a name, a file (`from_file`) or a LatentSpace.

        A space that is not known yet is registered, so that files, models and policies may name it.
        Raises LatentsError, also if the name belongs to another space.
        """
        if isinstance(given, Path) or (isinstance(given, str) and given.endswith(SUFFIXES)):
            return register(LatentSpace.from_file(given))
        return register(LatentSpace.get(given))

    @staticmethod
    def from_file(path: str | Path) -> LatentSpace:
        """A space of your own from a .json or .yaml file (docs/spaces.md).

        Raises LatentsError, one sentence that names the file, the line and the key.
        """
        return _space_of(read_record(Path(path).expanduser()), str(path))

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: str = "a latent space") -> LatentSpace:
        """A space from what `to_dict` returns, or from the contents of its file.

        Raises LatentsError, which names `source` and the key.
        """
        return _space_of(record_of(dict(values), source), source)

    def to_dict(self) -> dict[str, Any]:
        """Everything that `from_dict` needs, as JSON-able data; the form of a space's file."""
        scaling = {"scale": self.scale, "shift": self.shift}
        values: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "channels": self.channels,
            "factor": self.vae_scale_factor,
            "temporal_factor": self.temporal_factor,
            "scaling": {"from_vae": self.statistics_of_vae} if self.scale is None else scaling,
        }
        if self.packed_order is not None:
            values["packing"] = {"patch": self.packed_patch, "order": self.packed_order}
        if self.mean is not None and self.std is not None:
            values["statistics"] = {"mean": self.mean, "std": self.std}
        view = self.rgb_view
        if view is not None:
            values["rgb_view"] = {
                "acts_on": "scaled" if view.scaled else "raw",
                "factors": view.factors,
                "bias": view.bias,
                "source": view.source,
                "r2": view.r2,
            }
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @staticmethod
    def from_vae_config(config: Mapping[str, Any], classes: Sequence[str] = ()) -> LatentSpace:
        """The space that a diffusers `vae.config` describes, with the numbers of that config.

        Reads `latent_channels` or `z_dim`, `scaling_factor`, `shift_factor`, `latents_mean`,
        `latents_std`, `block_out_channels` and similar keys and, for FLUX.2, `batch_norm_eps` and
        `patch_size`. If the numbers are buffers of the VAE (flux2), the space still needs
        `with_batch_norm(...)` or `with_mean_std(...)` to convert.

        Args:
            classes: names of the VAE's class and its parents; without them, the names in the config
                (`_class_name`). Some spaces can be told only by the class.

        Raises:
            LatentsError: the config describes none of the known spaces, or is of an
                AutoencoderTiny, whose scaling_factor says nothing about the pipeline's latents.
        """
        return space_from_vae_config(config, classes, SPACES, list(RECORDS.values()))

    @staticmethod
    def of_pipeline(name: str) -> LatentSpace | None:
        """The space of a pipeline by the name of its class, from the spaces' files; None if none
        has it.
        """
        beginnings = [
            (len(start), record.name)
            for record in RECORDS.values()
            for start in record.pipelines
            if name.startswith(start)
        ]
        return SPACES[max(beginnings)[1]] if beginnings else None

    # -- raw <-> scaled ----------------------------------------------------------------------

    def with_batch_norm(
        self, mean: Sequence[float] | Tensor, var: Sequence[float] | Tensor, eps: float = 1e-4
    ) -> LatentSpace:
        """This space (flux2) with the statistics that convert between raw and scaled.

        Args:
            mean, var: 128 numbers each, the VAE's `bn.running_mean` and `bn.running_var`.
            eps: the VAE's `batch_norm_eps`.
        """
        if self.statistics_of_vae != "batch_norm":
            raise LatentsError(f"space {self.name} is not batch-normalized: only flux2 is")
        means, variances = _floats(mean), _floats(var)
        if len(means) != self.packed_channels or len(variances) != self.packed_channels:
            raise LatentsError(
                f"space {self.name}: batch-norm mean and var must hold {self.packed_channels} "
                f"numbers (the packed channels), got {len(means)} and {len(variances)}"
            )
        if not all(variance + eps > 0 for variance in variances):
            raise LatentsError(f"space {self.name}: batch-norm var must not be negative or NaN")
        scale = tuple(1.0 / math.sqrt(variance + eps) for variance in variances)
        return replace(self, scale=scale, shift=means)

    def with_mean_std(
        self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, factor: float = 1.0
    ) -> LatentSpace:
        """This space with `scaled = (raw - mean) * factor / std`.

        Args:
            mean, std: one number for each channel, as a VAE's `latents_mean` and `latents_std`.
            factor: the VAE's `scaling_factor`.
        """
        means, deviations = _floats(mean), _floats(std)
        if len(means) != self.channels or len(deviations) != self.channels:
            raise LatentsError(
                f"space {self.name}: mean and std must hold {self.channels} numbers (the "
                f"channels), got {len(means)} and {len(deviations)}"
            )
        if not all(deviation > 0 for deviation in deviations):
            raise LatentsError(f"space {self.name}: std must be above 0")
        return replace(self, scale=tuple(factor / one for one in deviations), shift=means)

    def to_scaled(self, raw: Tensor, batch_norm: BatchNorm | None = None) -> Tensor:
        """Raw latents [..., channels, H, W] to scaled ones of the same shape.

        Differentiable. Keeps dtype and device, and computes in float32 or above. flux2 needs even H
        and W, and the statistics, given here or in the space (`with_batch_norm`).
        """
        scaled: Tensor = scaling.to_scaled(at_least_single(raw), self._with(batch_norm))
        return scaled.to(raw.dtype)

    def to_raw(self, scaled: Tensor, batch_norm: BatchNorm | None = None) -> Tensor:
        """The inverse of `to_scaled`, with the same shape: what the VAE decodes."""
        raw: Tensor = scaling.to_raw(at_least_single(scaled), self._with(batch_norm))
        return raw.to(scaled.dtype)

    def is_scaled_as(self, other: LatentSpace) -> bool:
        """Whether scaled latents of both spaces have the same numbers, up to rounding.

        flux2 without its statistics fits flux2 with any statistics: scaled means normalized in
        both.
        """
        return scaling.same_scaling(self, other)

    def _with(self, batch_norm: BatchNorm | None) -> LatentSpace:
        return self if batch_norm is None else self.with_batch_norm(*batch_norm)

    # -- spatial <-> packed ------------------------------------------------------------------

    def to_packed(self, spatial: Tensor) -> Tensor:
        """[B, C, H, W] -> tokens [B, H/2 * W/2, C * 4], row-major, channels in `packed_order`."""
        tokens = self.patchify(spatial).flatten(2).transpose(1, 2)
        return tokens if self.packed_order == CANONICAL else tokens[..., self._token_order()]

    def to_spatial(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens [B, N, C * 4] -> [B, C, height, width]; height and width in latent cells."""
        self.check_packed(tuple(tokens.shape), height, width)
        rows, columns = height // self.packed_patch, width // self.packed_patch
        grid = (
            self.canonical(tokens).transpose(1, 2).reshape(-1, self.packed_channels, rows, columns)
        )
        return self.unpatchify(grid)

    pack, unpack = Former("to_packed"), Former("to_spatial")

    def canonical(self, tokens: Any) -> Any:
        """Tokens [..., C * 4], a tensor or an array, with their channels as c*4 + dy*2 + dx."""
        if self.packed_order in (None, CANONICAL):
            return tokens
        return tokens[..., np.argsort(self._token_order()).tolist()]

    def _token_order(self) -> list[int]:
        """For each channel of a token, which of c*4 + dy*2 + dx it holds."""
        assert self.packed_order is not None
        patch = self.packed_patch
        numbers = np.arange(self.packed_channels).reshape(self.channels, patch, patch)
        axes = [("c", "dy", "dx").index(axis) for axis in self.packed_order.split()]
        order: list[int] = numbers.transpose(axes).ravel().tolist()
        return order

    def size(
        self, shape: Sequence[int], layout: str, height: int | None, width: int | None
    ) -> tuple[int, int]:
        """Height and width in latent cells of latents of that shape and layout.

        height, width: what is known of them; packed latents do not carry it.
        Raises LatentsError if the shape does not fit this space, or contradicts them.
        """
        if layout == "packed":
            if not self.packs:
                raise LatentsError(f"space {self} has no packed layout: use layout='spatial'")
            if height is None or width is None:
                raise LatentsError(
                    "packed latents do not carry their size: give height and width in latent "
                    f"cells (pixels / {self.vae_scale_factor})"
                )
            if not (hasattr(height, "__index__") and hasattr(width, "__index__")):
                raise LatentsError(
                    f"height and width must be whole numbers, got {height!r} and {width!r}"
                )
            self.check_packed(shape, height, width)
            return height, width
        if layout == "patches":
            self._check_packs()
            if self.packed_order != CANONICAL:
                raise LatentsError(
                    f"space {self}: tokens have the order {self.packed_order}, and patches of such "
                    "an order are not known: give tokens, or [B, C, H, W]"
                )
            if len(shape) != 4 or shape[1] != self.packed_channels:
                raise LatentsError(
                    f"space {self}: patches must be [B, {self.packed_channels}, H/"
                    f"{self.packed_patch}, W/{self.packed_patch}], got {list(shape)}"
                )
            shape = (shape[0], self.channels, *(side * self.packed_patch for side in shape[2:]))
        if len(shape) != 4 or shape[1] != self.channels:
            raise LatentsError(
                f"space {self}: spatial latents must be [B, {self.channels}, H, W], "
                f"got {list(shape)}{self._other_form(shape)}"
            )
        actual = (int(shape[2]), int(shape[3]))
        if (height, width) not in ((None, None), actual):
            raise LatentsError(
                f"height and width say {height}x{width} latent cells, the tensor is "
                f"{actual[0]}x{actual[1]}{self._if_pixels((height, width), actual)}"
            )
        return actual

    def _if_pixels(self, said: tuple[int | None, int | None], actual: tuple[int, int]) -> str:
        factor = self.vae_scale_factor
        if said != (actual[0] * factor, actual[1] * factor):
            return ""
        return f": these are pixels, so divide them by {factor}"

    def _other_form(self, shape: Sequence[int]) -> str:
        """What to do with latents that are not spatial, as the end of a sentence."""
        if len(shape) == 5 and shape[1] == self.channels and shape[2] != 1:
            return f": latents of a video ({shape[2]} frames) are not images"
        if self.packed_patch > 1 and len(shape) == 4 and shape[1] == self.packed_channels:
            return ": these are patches, so say layout='patches'"
        return ""

    def check_packed(self, shape: Sequence[int], height: int, width: int) -> None:
        """LatentsError unless `shape` is that of packed latents of height x width cells."""
        self._check_packs()
        self.check_even(height, width)
        count = height // self.packed_patch * (width // self.packed_patch)
        if len(shape) != 3 or tuple(shape[1:]) != (count, self.packed_channels):
            raise LatentsError(
                f"space {self.name}: packed latents of {height}x{width} cells must be "
                f"[B, {count}, {self.packed_channels}], got {list(shape)} "
                f"(height and width are latent cells: pixels / {self.vae_scale_factor})"
            )

    def patchify(self, spatial: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C * 4, H/2, W/2], channel c*4 + dy*2 + dx."""
        from torch.nn.functional import pixel_unshuffle

        self._check_packs()
        if spatial.ndim != 4:
            raise LatentsError(
                f"space {self.name}: spatial latents must be [B, {self.channels}, H, W], "
                f"got {list(spatial.shape)}"
            )
        self._check_spatial(spatial)
        self.check_even(*spatial.shape[-2:])
        return pixel_unshuffle(spatial, self.packed_patch)

    def unpatchify(self, grid: Tensor) -> Tensor:
        """[B, C * 4, H/2, W/2] -> [B, C, H, W], the inverse of `patchify`."""
        from torch.nn.functional import pixel_shuffle

        self._check_packs()
        if grid.ndim != 4 or grid.shape[1] != self.packed_channels:
            raise LatentsError(
                f"space {self.name}: patched latents must be [B, {self.packed_channels}, H/2, "
                f"W/2], got {list(grid.shape)}"
            )
        return pixel_shuffle(grid, self.packed_patch)

    def _check_spatial(self, tensor: Tensor) -> None:
        if tensor.ndim < 3 or tensor.shape[-3] != self.channels:
            raise LatentsError(
                f"space {self.name}: latents must be [B, {self.channels}, H, W], "
                f"got {list(tensor.shape)}"
            )

    def _check_packs(self) -> None:
        if not self.packs:
            packing = ", ".join(space.name for space in SPACES.values() if space.packs)
            raise LatentsError(
                f"space {self.name} has no packed layout: only {packing} pack cells into tokens"
            )

    def check_even(self, height: int, width: int) -> None:
        if height < 1 or width < 1 or height % self.packed_patch or width % self.packed_patch:
            raise LatentsError(
                f"space {self.name}: height and width must be even numbers of latent cells for "
                f"its 2x2 packing, got {height}x{width}"
            )


def at_least_single(tensor: Tensor) -> Tensor:
    """Half precision as float32, in which conversions are computed; other dtypes as they are."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _floats(values: Sequence[float] | Tensor) -> tuple[float, ...]:
    plain = values.tolist() if hasattr(values, "tolist") else values
    return tuple(float(value) for value in plain)


def _factors(name: str, key: str, value: Any) -> Factors | None:
    """A number or a tuple of them, as floats. Raises LatentsError for anything else."""
    if value is None:
        return None
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        return tuple(float(number) for number in value)
    except (TypeError, ValueError, OverflowError) as error:
        raise LatentsError(
            f"space {name}: {key} must be a number or a list of numbers, got {value!r:.60}"
        ) from error


# -- the table -------------------------------------------------------------------------------

SPACES: dict[str, LatentSpace] = {}
"""Every space by its name, in its usual scaling: those that ship, then those registered."""
SCALINGS: dict[str, LatentSpace] = {}
"""Published scalings or token orders of a space that are not its usual ones, by the name that an
operator gives."""
RECORDS: dict[str, SpaceRecord] = {}
"""The files of the spaces that ship, with what is for people, and how a VAE is told."""
_ALIASES: dict[str, str] = {}


def register(space: LatentSpace) -> LatentSpace:
    """Make a space of your own known by its name, for as long as this process runs.

    A shipped space with a scaling of its own does not replace the shipped one. Raises LatentsError
    if the name is taken by another space.
    """
    if space.name in RECORDS:
        return space
    known = _known(space.name)
    if known is None:
        SPACES[space.name] = space
    elif known != space:
        raise LatentsError(
            f"there is another latent space called {space.name}: give yours another name"
        )
    return space


def known_names() -> list[str]:
    """Every name that `LatentSpace.get` takes, except aliases."""
    return list(dict.fromkeys([*SPACES, *SCALINGS, *plugins.names(plugins.SPACES)]))


def guess(name: object) -> str:
    """The known name that an unknown one is likely meant to be, as words in brackets, or ""."""
    near = difflib.get_close_matches(str(name)[:60], known_names(), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def all_spaces() -> Iterator[LatentSpace]:
    """Every known space, including those of installed packages that can be loaded."""
    for name in plugins.names(plugins.SPACES):
        if name not in SPACES:
            try:
                LatentSpace.get(name)
            except LatentsError:  # told where its space is asked for
                continue
    yield from SPACES.values()


def _known(name: str) -> LatentSpace | None:
    name = _ALIASES.get(name, name)
    found = SPACES.get(name, SCALINGS.get(name))
    if found is None and name in plugins.names(plugins.SPACES):
        found = plugins.load(plugins.SPACES, name, LatentSpace, LatentsError)
        if found.name != name:
            raise LatentsError(
                f"the package's entry point {name!r} of {plugins.SPACES} gives a space that is "
                f"called {found.name}: they must have one name"
            )
        SPACES[name] = found
    return found


def _space_of(record: SpaceRecord, source: str) -> LatentSpace:
    fields = {key: value for key, value in record.fields.items() if value is not None}
    fields |= {key: record.fields[key] for key in ("scale", "shift")}
    try:
        if record.of is None:
            return LatentSpace(name=record.name, **fields)
        if record.of not in SPACES:
            raise LatentsError(f"`of` must be one of {', '.join(SPACES)}, got {record.of!r}")
        # What it does not say is that space's.
        return replace(SPACES[record.of], **fields)
    except LatentsError as error:
        raise LatentsError(f"{source}: {error}") from error


def _load_shipped() -> None:
    records = shipped_records()
    for record in sorted(records, key=lambda record: record.of is not None):
        space = _space_of(record, f"{record.name}.json")
        (SPACES if record.of is None else SCALINGS)[record.name] = space
        _ALIASES.update(dict.fromkeys(record.aliases, record.name))
    RECORDS.update((record.name, record) for record in records)


_load_shipped()
