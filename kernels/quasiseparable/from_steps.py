"""Hydra's product from what its projections give; for short 16-bit rows without gradients in two kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Backend, choose
from ..transforms import call, plain_call
from .op import quasiseparable

# Of the kernel for short rows.
_LONGEST, _WIDEST = 256, 128


def quasiseparable_from_steps(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    diag: Tensor,
    D: Tensor,
    *,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`quasiseparable` with steps softplus(dt + dt_bias), decays exp(-exp(A_log) step) and the diagonal diag + D.

    Args:
        x: Input, (b, l, h, p).
        dt_f: Forward steps before bias and softplus, (b, l, h).
        dt_b: Backward ones.
        dt_bias: (h,).
        A_log: Logarithm of the decay rates, (h,).
        B_f: Input map forward, (b, l, g, n).
        C_f: Output map forward.
        B_b: Input map backward.
        C_b: Output map backward.
        diag: (b, l, h).
        D: (h,).
        chunk_size: Positions per chunk of the chunked path; None lets it choose.
        backend: As of `quasiseparable`.

    Returns:
        (b, l, h, p).
    """
    tensors = x, dt_f, dt_b, dt_bias, A_log, B_f, C_f, B_b, C_b, diag, D
    short = plain_call(*tensors) and _short(x, B_f, C_f, B_b, C_b)
    if short and choose(backend, x, op="quasiseparable") == "triton":
        from .triton_short import quasiseparable_short

        return call(quasiseparable_short, *tensors)
    wide = torch.promote_types(x.dtype, torch.float32)
    rate = -A_log.to(wide).exp()
    forward, backward = (F.softplus(dt.to(wide) + dt_bias.to(wide)) for dt in (dt_f, dt_b))
    y, _ = quasiseparable(
        x,
        forward * rate,
        forward,
        B_f,
        C_f,
        backward * rate,
        backward,
        B_b,
        C_b,
        diag + D,
        chunk_size=chunk_size,
        backend=backend,
    )
    return y


def _short(x: Tensor, *maps: Tensor) -> bool:
    """Whether the kernel for short rows takes these."""
    if x.dtype.itemsize != 2 or not 0 < x.shape[1] <= _LONGEST or x.numel() == 0:
        return False
    return 0 < maps[0].shape[3] <= _WIDEST >= x.shape[3] and all(one.dtype == x.dtype for one in maps)
