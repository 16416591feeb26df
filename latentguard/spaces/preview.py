"""A small RGB picture of latents without a VAE: the published or fitted linear view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from latentguard.errors import LatentsError
from latentguard.spaces.rgb import RGBView

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from latentguard.spaces.arrays import LatentArray
    from latentguard.spaces.latents import Latents
    from latentguard.spaces.space import LatentSpace


def rgb_preview(
    latents: Latents, upscale: int = 1, mode: Literal["nearest", "bicubic"] = "nearest"
) -> NDArray[np.uint8]:
    """What the latents show, one pixel per cell: uint8 [B, H * upscale, W * upscale, 3].

    A linear map of each cell, so colors and layout are right and detail is missing. Values out
    of range are clipped; NaN becomes black. Computed in float32 on the tensor's device.

    Args:
        latents: of any space, scaling and layout; raw flux2 needs a space with its batch-norm
            statistics, as the view is of scaled latents.
        upscale: 1 to 64; 8 gives the size of the decoded image.
        mode: how cells become pixels when upscaled.

    Raises:
        LatentsError: a bad option, a space without a view, or raw flux2 latents without statistics.
    """
    import torch

    if not 1 <= upscale <= 64:
        raise LatentsError(f"upscale must be 1 to 64, got {upscale}")
    if mode not in ("nearest", "bicubic"):
        raise LatentsError(f"mode must be nearest or bicubic, got {mode!r}")
    with torch.no_grad():
        rgb = linear_rgb(latents)
        if upscale > 1:
            options: dict[str, Any] = {} if mode == "nearest" else {"align_corners": False}
            rgb = torch.nn.functional.interpolate(rgb, scale_factor=upscale, mode=mode, **options)
        pixels = ((rgb + 1) * 127.5).nan_to_num(0.0).clamp(0, 255).round().to(torch.uint8)
        picture: NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return picture


def array_preview(latents: LatentArray) -> NDArray[np.uint8]:
    """`rgb_preview` without torch, one pixel per cell: uint8 [B, H, W, 3]."""
    import numpy as np

    from latentguard.spaces.arrays import widened

    view = _view(latents.space.standard)
    factors = np.asarray(view.factors, np.float32)
    numbers = widened(latents.to_standard(view.scaled).array).astype(np.float32, copy=False)
    rgb = np.einsum("bchw,cr->bhwr", numbers, factors) + np.asarray(view.bias, np.float32)
    pixels = np.clip(np.nan_to_num((rgb + 1) * 127.5), 0, 255).round()
    picture: NDArray[np.uint8] = pixels.astype(np.uint8)
    return picture


def linear_rgb(latents: Latents) -> Tensor:
    """The linear RGB view itself: float32 [B, 3, H, W], about [-1, 1], differentiable."""
    import torch

    view = _view(latents.space.standard)
    numbers = latents.to_spatial().to_standard(view.scaled).tensor.float()
    factors = numbers.new_tensor(view.factors)
    bias = numbers.new_tensor(view.bias)
    return torch.einsum("bchw,cr->brhw", numbers, factors) + bias.view(1, 3, 1, 1)


def _view(space: LatentSpace) -> RGBView:
    if space.rgb_view is None:
        raise LatentsError(f"space {space} has no RGB view: nothing shows its latents undecoded")
    return space.rgb_view
