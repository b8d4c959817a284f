"""`rounded_layer_norm`: the norm between a wide stream and a product of 16 bits, rounded where it is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import choose
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
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and not torch.compiler.is_compiling() and plain_call(x, weight, bias):
        dtype = torch.get_autocast_dtype(kind)
        narrow = dtype.itemsize == 2 and x.dtype == weight.dtype == bias.dtype == torch.float32
        fits = x.numel() > 0 and x.shape[-1] == weight.numel() <= 16384
        if narrow and fits and choose("auto", x, op="rounded_layer_norm") == "triton":
            from .triton_step import layer_norm_triton

            return call(layer_norm_triton, x, weight, bias, eps, dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)
