"""Tensors as their bytes: what is judged is what everything after it computes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentguard.errors import LatentsError


def plain(tensor: Any) -> Tensor:
    """A tensor's own bytes as a torch.Tensor: the tensor itself where its class is no other.

    A subclass may answer one question differently from the next, so none is asked here. Those that
    keep their numbers in the tensor (Parameter, and others of torch.Tensor's own dispatch) lose
    their class. Raises LatentsError for what has no dense numbers of its own: other classes,
    wrappers of other tensors, fake, sparse and nested tensors.
    """
    kind = type(tensor)
    if not issubclass(kind, Tensor):
        raise LatentsError(f"latents must be a torch.Tensor, got {kind.__name__}")
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise LatentsError(
            f"latents must be a torch.Tensor that holds its own numbers, got {kind.__name__}, "
            "which computes them elsewhere: give a plain tensor"
        )
    with torch._C.DisableTorchFunctionSubclass():
        own = tensor if kind is Tensor else Tensor.as_subclass(tensor, Tensor)
    if own.layout is not torch.strided or own.is_nested:
        raise LatentsError(f"latents must be a dense torch.Tensor, got layout {own.layout}")
    return own


def private(tensor: Any) -> Tensor:
    """A copy that nobody else holds, so that nothing changes it while it is judged or after.

    Raises LatentsError as `plain` does.
    """
    return plain(tensor).clone()


def laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor with the dtype, shape and strides of another, which it has as many numbers as.

    Convolutions of another memory format round otherwise, so an image that nothing was done to has
    to go on in its own.
    """
    tensor = tensor.reshape(other.shape).to(other.dtype)
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other).copy_(tensor)


def equal(tensor: Tensor | None, other: Any) -> bool:
    """Bit for bit, shape, dtype and device too, and so never with NaN."""
    return (
        tensor is not None
        and isinstance(other, Tensor)
        and (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)
        and torch.equal(tensor, other)
    )
