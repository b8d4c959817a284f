"""What stands beside the ops of `omnissm.kernels` in `run.py`: torch's own functions, and attention for scale."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def conv1d_of_torch(x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    k = weight.shape[1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = F.conv1d(F.pad(x.mT, (k - 1, 0)), weight[:, None], bias, groups=weight.shape[0])
    return F.silu(y).mT, x[:, 1 - k :].mT


def rms_norm_of_torch(x: Tensor, z: Tensor, weight: Tensor, eps: float, **_: Any) -> Tensor:
    return F.rms_norm(x * F.silu(z), (x.shape[-1],), weight.to(x.dtype), eps)


def convolution_of_torch(x: Tensor, kernel: Tensor, D: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    length = x.shape[1] + kernel.shape[1]
    wide = x.float().mT
    y = torch.fft.irfft(torch.fft.rfft(wide, length) * torch.fft.rfft(kernel, length), length)[..., : x.shape[1]]
    return (y + D[:, None] * wide).mT.to(x.dtype), x[:, x.shape[1] + 1 - kernel.shape[1] :].mT


def attention_of_torch(x: Tensor, is_causal: bool = True, **_: Any) -> Tensor:
    """Attention with as many heads of the same width; on a GPU and in 16 bit, flash attention."""
    heads = x.transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=is_causal).transpose(1, 2)


# What torch itself offers for the same result.
PEERS: dict[str, dict[str, Callable[..., Any]]] = {
    "causal_conv1d": {"torch conv1d": conv1d_of_torch},
    "gated_norm": {"torch rms_norm": rms_norm_of_torch},
    "fft_conv": {"torch fft": convolution_of_torch},
}
# What does another thing at the same shape, for scale: not compared with ours, and left out for very long rows.
FOR_SCALE: dict[str, dict[str, Callable[..., Any]]] = {
    "ssd": {"torch attention": attention_of_torch},
    "trapezoid_ssd": {"torch attention": attention_of_torch},
    "quasiseparable": {"torch attention": functools.partial(attention_of_torch, is_causal=False)},
}
LONGEST_ATTENTION = 2**17
