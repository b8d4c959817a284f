"""value * silu(gate), the middle of a gated MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_floating, check_shapes
from .dispatch import choose
from .transforms import plain_call


def swiglu(x: Tensor) -> Tensor:
    """y = value * silu(gate) with [value, gate] = x, halves of the last dimension.

    Args:
        x: (..., 2 h).

    Returns:
        (..., h) in the dtype of `x`.

    Raises:
        TypeError: if `x` is no floating tensor.
        ValueError: if there is no last dimension or it is odd.

    Differentiable. Source: Shazeer (2020), section 2.
    """
    check_floating(x=x)
    check_shapes(x=(x, "... d"))
    if x.shape[-1] % 2:
        raise ValueError(f"`x` must hold two halves, got a last dimension of {x.shape[-1]}.")
    fused = not torch.compiler.is_compiling() and x.numel() > 0 and x.dtype != torch.float64
    if fused and plain_call(x) and choose("auto", x, op="swiglu") == "triton":
        from .triton_pointwise import swiglu_triton

        return swiglu_triton(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)
