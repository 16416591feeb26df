"""The table of latent spaces and the exact conversions between their conventions.

Every space obeys `scaled = (raw - shift) * scale`: raw is what the VAE encodes and decodes, scaled
is what the diffusion model denoises. Factors are one number, one per channel, or (flux2) one per
channel of the 2x2 packing. Sources: `vae.config` of the published pipelines and diffusers 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from latentguard.deprecated import Former, former_keywords
from latentguard.errors import LatentsError
from latentguard.spaces import scaling
from latentguard.spaces.vae_config import space_from_vae_config

if TYPE_CHECKING:
    from torch import Tensor

Factors = float | tuple[float, ...]
RGB = tuple[float, float, float]


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
        name: `sdxl`, `sd1`, `sd3`, `flux1` or `flux2`.
        channels: channels of the spatial layout [B, channels, H, W].
        vae_scale_factor: pixels per latent cell and axis.
        scale, shift: `scaled = (raw - shift) * scale`; a number, `channels` numbers, or
            `packed_channels` numbers in packed order, finite and near what the statistics of
            images make plausible. None where the numbers are no constants of the space (flux2
            without its batch-norm statistics).
        packed_patch: 2 where the pipeline packs 2x2 cells into one token, else 1.
        mean, std: per-channel statistics of raw latents over natural images, or None.
        rgb_factors, rgb_bias: linear RGB view of *scaled* latents, [channels][3] and [3],
            giving about [-1, 1] at one pixel per cell.
    """

    name: str
    channels: int
    scale: Factors | None
    shift: Factors | None
    rgb_factors: tuple[RGB, ...]
    rgb_bias: RGB
    vae_scale_factor: int = 8
    packed_patch: int = 1
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    factor = Former("vae_scale_factor")

    def __post_init__(self) -> None:
        scaling.check_plausible(self)

    def __str__(self) -> str:
        return self.name

    @property
    def packed_channels(self) -> int:
        """Channels of one token of the packed layout (equal to `channels` without packing)."""
        return self.channels * self.packed_patch**2

    # -- finding a space ---------------------------------------------------------------------

    @staticmethod
    def get(name: str | LatentSpace) -> LatentSpace:
        """The space of that name (a LatentSpace passes through). LatentsError lists the names.

        A name of `SCALINGS` gives the space with that scaling.
        """
        if isinstance(name, LatentSpace):
            return name
        known = SPACES | SCALINGS
        if not isinstance(name, str) or name not in known:
            raise LatentsError(f"unknown latent space {name!r}: use one of {', '.join(known)}")
        return known[name]

    @staticmethod
    def from_vae_config(config: Mapping[str, Any]) -> LatentSpace:
        """The space that a diffusers `vae.config` describes, with that config's own numbers.

        Reads `latent_channels`, `scaling_factor`, `shift_factor`, `latents_mean`, `latents_std`,
        `block_out_channels` and, for FLUX.2, `batch_norm_eps` and `patch_size`. A FLUX.2 space
        still needs `with_batch_norm(...)` to convert, as the statistics are buffers of the VAE.

        Raises:
            LatentsError: the config describes none of the known spaces, or is of an
                AutoencoderTiny, whose scaling_factor says nothing about the pipeline's latents.
        """
        return space_from_vae_config(config, SPACES)

    # -- raw <-> scaled ----------------------------------------------------------------------

    def with_batch_norm(
        self, mean: Sequence[float] | Tensor, var: Sequence[float] | Tensor, eps: float = 1e-4
    ) -> LatentSpace:
        """This space (flux2) with the statistics that raw <-> scaled needs.

        Args:
            mean, var: 128 numbers each, the VAE's `bn.running_mean` and `bn.running_var`.
            eps: the VAE's `batch_norm_eps`.
        """
        if self.name != "flux2":
            raise LatentsError(f"space {self.name} is not batch-normalised: only flux2 is")
        means, variances = _floats(mean), _floats(var)
        if len(means) != self.packed_channels or len(variances) != self.packed_channels:
            raise LatentsError(
                f"space flux2: batch-norm mean and var must hold {self.packed_channels} numbers "
                f"(the packed channels), got {len(means)} and {len(variances)}"
            )
        if not all(variance + eps > 0 for variance in variances):
            raise LatentsError("space flux2: batch-norm var must not be negative or NaN")
        scale = tuple(1.0 / math.sqrt(variance + eps) for variance in variances)
        return replace(self, scale=scale, shift=means)

    def to_scaled(self, raw: Tensor, batch_norm: BatchNorm | None = None) -> Tensor:
        """[..., channels, H, W] as the VAE encodes -> the same shape as the model denoises.

        Differentiable; keeps dtype and device; computes in float32 or above. flux2 needs even H
        and W and the statistics, here or in the space (`with_batch_norm`).
        """
        scaled: Tensor = scaling.to_scaled(at_least_single(raw), self._with(batch_norm))
        return scaled.to(raw.dtype)

    def to_raw(self, scaled: Tensor, batch_norm: BatchNorm | None = None) -> Tensor:
        """The inverse of `to_scaled`, same shape: what the VAE decodes."""
        raw: Tensor = scaling.to_raw(at_least_single(scaled), self._with(batch_norm))
        return raw.to(scaled.dtype)

    def is_scaled_as(self, other: LatentSpace) -> bool:
        """Whether scaled latents of both have the same numbers, but for rounding.

        flux2 without its statistics fits flux2 with any: scaled means normalised in both.
        """
        return scaling.same_scaling(self, other)

    def _with(self, batch_norm: BatchNorm | None) -> LatentSpace:
        return self if batch_norm is None else self.with_batch_norm(*batch_norm)

    # -- spatial <-> packed ------------------------------------------------------------------

    def to_packed(self, spatial: Tensor) -> Tensor:
        """[B, C, H, W] -> tokens [B, H/2 * W/2, C * 4], row-major, channel c*4 + dy*2 + dx."""
        return self.patchify(spatial).flatten(2).transpose(1, 2)

    def to_spatial(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens [B, N, C * 4] -> [B, C, height, width]; height and width in latent cells."""
        self.check_packed(tuple(tokens.shape), height, width)
        rows, columns = height // self.packed_patch, width // self.packed_patch
        grid = tokens.transpose(1, 2).reshape(-1, self.packed_channels, rows, columns)
        return self.unpatchify(grid)

    pack, unpack = Former("to_packed"), Former("to_spatial")

    def size(
        self, shape: Sequence[int], layout: str, height: int | None, width: int | None
    ) -> tuple[int, int]:
        """Height and width in latent cells of latents of that shape and layout.

        height, width: what is known of them; packed latents do not carry it.
        Raises LatentsError where the shape is not this space's, or contradicts them.
        """
        if layout == "packed":
            if self.packed_patch == 1:
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
        if len(shape) != 4 or shape[1] != self.channels:
            raise LatentsError(
                f"space {self}: spatial latents must be [B, {self.channels}, H, W], "
                f"got {list(shape)}"
            )
        actual = (int(shape[2]), int(shape[3]))
        if (height, width) not in ((None, None), actual):
            raise LatentsError(
                f"height and width say {height}x{width} latent cells, the tensor is "
                f"{actual[0]}x{actual[1]}"
            )
        return actual

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
        if self.packed_patch == 1:
            raise LatentsError(
                f"space {self.name} has no packed layout: only flux1 and flux2 pack 2x2 cells"
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


# RGB views. sd1, sdxl, sd3 and flux1: ComfyUI's comfy/latent_formats.py (SD15, SDXL, SD3, Flux),
# which fits them to scaled latents; its previewer shows (rgb + 1) / 2.
_RGB_SDXL: tuple[RGB, ...] = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
)
_RGB_SD1: tuple[RGB, ...] = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
)
_RGB_SD3: tuple[RGB, ...] = (
    (-0.0922, -0.0175, 0.0749),
    (0.0311, 0.0633, 0.0954),
    (0.1994, 0.0927, 0.0458),
    (0.0856, 0.0339, 0.0902),
    (0.0587, 0.0272, -0.0496),
    (-0.0006, 0.1104, 0.0309),
    (0.0978, 0.0306, 0.0427),
    (-0.0042, 0.1038, 0.1358),
    (-0.0194, 0.0020, 0.0669),
    (-0.0488, 0.0130, -0.0268),
    (0.0922, 0.0988, 0.0951),
    (-0.0278, 0.0524, -0.0542),
    (0.0332, 0.0456, 0.0895),
    (-0.0069, -0.0030, -0.0810),
    (-0.0596, -0.0465, -0.0293),
    (-0.1448, -0.1463, -0.1189),
)
_RGB_FLUX1: tuple[RGB, ...] = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
# flux2: fitted with benchmarks/fit_rgb_preview.py to TAEF2 latents (scaled) of 2,400 Caltech-101
# crops, colour-jittered; on the fifth held out R^2 is 0.742, 0.761, 0.722 for red, green, blue.
# ComfyUI's factors (Flux2) reach 0.705, 0.728, 0.694 on the same latents and correlate with these
# at 0.95, which also says that TAEF2 speaks the pipeline's scaled convention.
_RGB_FLUX2: tuple[RGB, ...] = (
    (-0.0142, -0.0111, -0.0106),
    (-0.0099, -0.0064, 0.0251),
    (-0.0217, 0.0130, 0.0543),
    (0.2147, 0.2763, 0.3331),
    (-0.0166, -0.0428, -0.0580),
    (-0.0114, -0.0218, -0.0412),
    (-0.0270, 0.0546, -0.0156),
    (-0.0088, -0.0007, 0.0014),
    (-0.3074, -0.2515, -0.1789),
    (-0.0184, -0.0392, -0.0468),
    (-0.0244, -0.0059, -0.0011),
    (0.0402, -0.0109, -0.0933),
    (0.0188, 0.0300, 0.0462),
    (0.0185, 0.0085, -0.0080),
    (0.0115, 0.0256, 0.0219),
    (-0.0374, 0.0151, 0.0241),
    (0.0207, 0.0211, 0.0160),
    (0.0210, 0.0077, -0.0022),
    (0.0113, 0.0113, 0.0137),
    (0.0734, -0.0026, 0.0028),
    (-0.0021, -0.0007, 0.0018),
    (-0.0117, -0.0152, -0.0113),
    (-0.0031, -0.0102, -0.0169),
    (-0.0024, 0.0047, 0.0106),
    (-0.0215, 0.0032, -0.0084),
    (-0.0141, -0.0125, -0.0114),
    (-0.0049, -0.0268, -0.0193),
    (0.0125, 0.0093, 0.0030),
    (-0.0229, -0.0226, -0.0210),
    (-0.0566, -0.0256, -0.0118),
    (0.0045, 0.0123, 0.0093),
    (0.0250, 0.0013, -0.0117),
)
_RGB_BIAS_FLUX2: RGB = (0.0229, -0.0255, -0.0919)

# Statistics of raw latents. sdxl: `latents_mean` and `latents_std` that Playground 2.5's VAE config
# gives for the SDXL VAE. sd1: `raw_mean` and `raw_std` of sd-vae-ft-mse (the SD 1 encoder) over
# ImageNet in NVlabs/edm2, training/encoders.py.
SPACES: dict[str, LatentSpace] = {
    space.name: space
    for space in (
        LatentSpace(
            name="sdxl",
            channels=4,
            scale=0.13025,
            shift=0.0,
            mean=(-1.6574, 1.886, -1.383, 2.5155),
            std=(8.4927, 5.9022, 6.5498, 5.2299),
            rgb_factors=_RGB_SDXL,
            rgb_bias=(0.1084, -0.0175, -0.0011),
        ),
        LatentSpace(
            name="sd1",
            channels=4,
            scale=0.18215,
            shift=0.0,
            mean=(5.81, 3.25, 0.12, -2.15),
            std=(4.17, 4.62, 3.71, 3.28),
            rgb_factors=_RGB_SD1,
            rgb_bias=(0.0, 0.0, 0.0),
        ),
        LatentSpace(
            name="sd3",
            channels=16,
            scale=1.5305,
            shift=0.0609,
            rgb_factors=_RGB_SD3,
            rgb_bias=(0.2394, 0.2135, 0.1925),
        ),
        LatentSpace(
            name="flux1",
            channels=16,
            scale=0.3611,
            shift=0.1159,
            packed_patch=2,
            rgb_factors=_RGB_FLUX1,
            rgb_bias=(-0.0329, -0.0718, -0.0851),
        ),
        LatentSpace(
            name="flux2",
            channels=32,
            scale=None,
            shift=None,
            packed_patch=2,
            rgb_factors=_RGB_FLUX2,
            rgb_bias=_RGB_BIAS_FLUX2,
        ),
    )
}

# Playground 2.5 denoises SDXL's latents normalised per channel; its VAE config's numbers.
_SDXL_MEAN, _SDXL_STD = SPACES["sdxl"].mean, SPACES["sdxl"].std
assert _SDXL_MEAN is not None
assert _SDXL_STD is not None
SCALINGS: dict[str, LatentSpace] = {
    "sdxl-playground25": replace(
        SPACES["sdxl"], scale=tuple(0.5 / std for std in _SDXL_STD), shift=_SDXL_MEAN
    ),
}
"""Published scalings of a space that are not its usual one, by the name that an operator gives."""
