"""The state-space recurrences of vision models, each as one function that tracing tools take as a single node.

torch.fx leaves them alone and TorchScript calls them as they are, so that mixers built on them pass both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor

from ..kernels import causal_conv1d, selective_scan

__all__ = ["selective_mix", "short_conv"]


@register_notrace_function
@torch.jit.ignore
def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, symmetric: bool) -> Tensor:
    """silu of a depthwise convolution along dim 1, causal or centred; x (b, l, d), weight (d, k) or (d, 1, k)."""
    return causal_conv1d(x, weight.flatten(1), bias, symmetric=symmetric)[0]


@register_notrace_function
@torch.jit.ignore
def selective_mix(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, window: int
) -> Tensor:
    """Selective scan along dim 1 with float32 steps, rates and states.

    Args:
        x: Input, (b, l, d).
        dt: Steps before bias and softplus, (b, l, d).
        dt_bias: (d,).
        A_log: Logarithm of the decay rates, (d, n).
        B: Input maps, (b, l, n) or (b, l, g, n).
        C: Output maps, like `B`.
        D: Skip, (d,).
        window: Segment of the local backward scan; 0 for none.

    Returns:
        (b, l, d) in float32, so that directions are summed before rounding.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = F.softplus(dt.to(wide) + dt_bias.to(wide))
    A = -A_log.to(wide).exp()
    return selective_scan(x, dt, A, B, C, D.to(wide), window=window or None)[0].to(wide)
