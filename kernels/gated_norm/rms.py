"""`rms_norm`: the norm before a mixer, of a stream wider than the mixer. Without a gradient one kernel on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_devices, check_floating, check_shapes
from ..dispatch import choose
from ..transforms import plain_call


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, of `x` rounded to the dtype of `weight`.

    Args:
        x: (..., d), rounded first, as where a float32 stream enters a layer of bfloat16.
        weight: (d,).
        eps: Added to the mean square.

    Returns:
        (..., d) in the dtype of `weight`; statistics in float32 or wider.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree.

    Differentiable in `x` and `weight`. Source: Zhang & Sennrich (2019), equation (4).
    """
    check_floating(x=x, weight=weight)
    check_shapes(x=(x, "... d"), weight=(weight, "d"))
    check_devices(x=x, weight=weight)
    fused = x.numel() > 0 and weight.dtype != torch.float64 and weight.numel() <= 16384
    if fused and plain_call(x, weight) and choose("auto", x, op="rms_norm") == "triton":
        from .triton_step import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    x = x.to(weight.dtype)
    if x.is_cuda and not torch.is_autocast_enabled("cuda"):
        return F.rms_norm(x, weight.shape, weight, eps)  # one kernel, float32 inside
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)
