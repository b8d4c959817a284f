"""The convolution in plain PyTorch: k shifted multiply-adds, which torch.compile fuses into one pass.

In eager mode on a CPU, where nothing is packed, torch's own depthwise convolution is faster, above all backward. It
would keep a padded copy of the input and, for silu, its output; of large inputs both are formed again going backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..transforms import transforming

# Numbers of an input from which memory weighs more than the time of a second forward pass.
_LARGE = 1 << 18


def causal_conv1d_chunked(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    """See `causal_conv1d_reference`."""
    k, extra = weight.shape[1], x.shape[1] - length
    right = k - 1 - left - extra
    if seq_idx is None and x.device.type == "cpu" and not torch.compiler.is_compiling():
        arguments = x, weight, bias, left, right, silu
        if x.numel() >= _LARGE and torch.is_grad_enabled() and not transforming() and not torch.jit.is_tracing():
            return checkpoint(_by_torch, *arguments, use_reentrant=False, preserve_rng_state=False)
        return _by_torch(*arguments)
    wide = F.pad(x.to(weight.dtype), (0, 0, left, right))
    y = torch.zeros((), dtype=weight.dtype, device=x.device) if bias is None else bias
    index = None if seq_idx is None else F.pad(seq_idx, (left, right))  # the padding of x is zero in any sequence
    for i in range(k):
        term = wide[:, i : i + length] * weight[:, i]
        if index is not None and seq_idx is not None:
            same = index[:, i : i + length] == seq_idx[:, extra:]
            term = torch.where(same[..., None], term, torch.zeros_like(term))
        y = y + term
    return (F.silu(y) if silu else y).to(x.dtype)


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, left: int, right: int, silu: bool) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # it would round the parameters
        wide = F.pad(x.to(weight.dtype).mT, (left, right))
        y = F.conv1d(wide, weight[:, None], bias, groups=weight.shape[0]).mT.contiguous()
    return (F.silu(y) if silu else y).to(x.dtype)
