"""The convolution in plain PyTorch: k shifted multiply-adds, which torch.compile fuses into one pass.

In eager mode on a CPU, where nothing is packed, torch's own depthwise convolution is faster, above all backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_chunked(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    """See `causal_conv1d_reference`."""
    k, extra = weight.shape[1], x.shape[1] - length
    right = k - 1 - left - extra
    wide = x.to(weight.dtype)
    if seq_idx is None and x.device.type == "cpu" and not torch.compiler.is_compiling():
        with torch.autocast("cpu", enabled=False):  # it would round the parameters
            y = F.conv1d(F.pad(wide.mT, (left, right)), weight[:, None], bias, groups=weight.shape[0]).mT.contiguous()
    else:
        y = torch.zeros((), dtype=weight.dtype, device=x.device) if bias is None else bias
        wide = F.pad(wide, (0, 0, left, right))
        index = None if seq_idx is None else F.pad(seq_idx, (left, right))  # the padding of x is zero in any sequence
        for i in range(k):
            term = wide[:, i : i + length] * weight[:, i]
            if index is not None and seq_idx is not None:
                same = index[:, i : i + length] == seq_idx[:, extra:]
                term = torch.where(same[..., None], term, torch.zeros_like(term))
            y = y + term
    return (F.silu(y) if silu else y).to(x.dtype)
