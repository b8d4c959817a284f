"""`rounded_layer_norm`: the norm between a wide stream and a product of 16 bits, rounded where it is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import autocast_enabled, choose
from ..transforms import call, plain_call


def rounded_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension, for a product that rounds it to the dtype of autocast anyway.

    Args:
        x: (..., d).
        weight: (d,).
        bias: (d,).
        eps: Added to the variance.

    Returns:
        (..., d), from one kernel without a gradient in eager mode under autocast on a GPU, then in the dtype of
        autocast; else what torch gives.
    """
    dtype = _rounded(x, weight, bias)
    if dtype is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    from .triton_step import layer_norm_triton

    return call(layer_norm_triton, x, weight, bias, eps, dtype)


def add_rounded_layer_norm(x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A residual sum and its norm: x + added, and `rounded_layer_norm` of it.

    Args:
        x: Stream, (..., d).
        added: What is added, in the shape of `x`.
        weight: (d,).
        bias: (d,).
        eps: Added to the variance.

    Returns:
        The sum in the dtype of x + added, (..., d), and its norm as `rounded_layer_norm` gives it.
    """
    dtype = _rounded(x, weight, bias)
    if dtype is None or added.shape != x.shape or not plain_call(added):
        x = x + added
        return x, rounded_layer_norm(x, weight, bias, eps)
    from .triton_step import add_layer_norm_triton

    return call(add_layer_norm_triton, x, added, weight, bias, eps, dtype)


def _rounded(x: Tensor, weight: Tensor, bias: Tensor) -> torch.dtype | None:
    """The dtype that the kernel rounds to, None where torch's own norm is taken."""
    kind = x.device.type
    if not autocast_enabled(kind) or torch.compiler.is_compiling() or not plain_call(x, weight, bias):
        return None
    dtype = torch.get_autocast_dtype(kind)
    narrow = dtype.itemsize == 2 and x.dtype == weight.dtype == bias.dtype == torch.float32
    if not narrow or not x.numel() or not x.shape[-1] == weight.numel() <= 16384:
        return None
    return dtype if choose("auto", x, op="rounded_layer_norm") == "triton" else None
