"""Steps and log-decays of Mamba-2 from what its projection gives. In float32 without a gradient one kernel on a GPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_devices, check_floating, check_shapes
from ..dispatch import choose
from ..transforms import plain_call


def ssd_rates(
    raw: Tensor, bias: Tensor, A_log: Tensor, *, limit: tuple[float, float] = (0.0, math.inf)
) -> tuple[Tensor, Tensor]:
    """dt = clamp(softplus(raw + bias), limit) and log_decay = -exp(A_log) dt, the `weight` and `log_decay` of `ssd`.

    Args:
        raw: Before the softplus, (..., h).
        bias: (h,).
        A_log: Logarithm of the decay rates, (h,).
        limit: Smallest and largest step.

    Returns:
        dt and log_decay, (..., h), in float32 or the widest dtype of the arguments.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree.

    Differentiable in all three tensors. Source: Dao & Gu (2024), "Transformers are SSMs", section 7.
    """
    check_floating(raw=raw, bias=bias, A_log=A_log)
    check_shapes(raw=(raw, "... h"), bias=(bias, "h"), A_log=(A_log, "h"))
    check_devices(raw=raw, bias=bias, A_log=A_log)
    dtype = torch.promote_types(torch.promote_types(raw.dtype, bias.dtype), torch.float32)
    dtype = torch.promote_types(dtype, A_log.dtype)
    plain = raw.numel() > 0 and dtype == torch.float32 and plain_call(raw, bias, A_log)
    if plain and choose("auto", raw, op="ssd_rates") == "triton":
        from .triton_step import ssd_rates_triton

        dt, log_decay = ssd_rates_triton(raw, bias, A_log, *limit)
        return dt, log_decay
    dt = F.softplus(raw.to(dtype) + bias.to(dtype))
    if tuple(limit) != (0.0, math.inf):
        dt = dt.clamp(*limit)
    return dt, -dt * A_log.to(dtype).exp()
