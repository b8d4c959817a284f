"""The coupled two-state recurrence over a grid as a double loop over its cells; equations in docs/ops/scan2d.md.

h1[i,j] = a1[i,j] h1[i,j-1] + a2[i,j] h2[i,j-1] + b1[i,j]
h2[i,j] = a3[i,j] h1[i-1,j] + a4[i,j] h2[i-1,j] + b2[i,j]
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan2d_reference(a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence cell by cell; any dtype, autograd supplies the gradient."""
    rows, columns = b1.shape[1:3]
    outside = torch.zeros_like(b1[:, 0, 0])
    h1: dict[tuple[int, int], Tensor] = {}
    h2: dict[tuple[int, int], Tensor] = {}
    for i in range(rows):
        for j in range(columns):
            left, above = (i, j - 1), (i - 1, j)
            h1[i, j] = a1[:, i, j] * h1.get(left, outside) + a2[:, i, j] * h2.get(left, outside) + b1[:, i, j]
            h2[i, j] = a3[:, i, j] * h1.get(above, outside) + a4[:, i, j] * h2.get(above, outside) + b2[:, i, j]
    shape = (rows, columns)
    return (
        torch.stack(list(h1.values()), dim=1).unflatten(1, shape),
        torch.stack(list(h2.values()), dim=1).unflatten(1, shape),
    )


def selective_scan2d_reference(
    x: Tensor,
    dt1: Tensor,
    dt2: Tensor,
    A1_log: Tensor,
    A4_log: Tensor,
    theta2: Tensor,
    theta3: Tensor,
    B1: Tensor,
    B2: Tensor,
    C1: Tensor,
    C2: Tensor,
    D: Tensor,
    *,
    kappa: float,
    coupling: str,
    input_discretization: str,
    time_gap: Tensor | None,
) -> Tensor:
    """All coefficients written out in full, (b, i, j, d, n), then `scan2d_reference`."""
    batch = x.shape[0]
    alpha1, alpha4, c2, c3 = (
        per_batch(parameter, batch)[:, None, None]  # (b, 1, 1, d, n)
        for parameter in (A1_log.exp(), A4_log.exp(), kappa * theta2.tanh(), kappa * theta3.tanh())
    )
    gap = 1.0 if time_gap is None else per_batch(time_gap, batch, repeat=True)[:, None, :, None, None]
    e1, e2 = dt1[..., None] * gap * alpha1, dt2[..., None] * alpha4
    a2 = -c2 * torch.expm1(-e1) if coupling in ("full", "variate_to_time") else torch.zeros_like(e1)
    a3 = -c3 * torch.expm1(-e2) if coupling in ("full", "time_to_variate") else torch.zeros_like(e2)
    if input_discretization == "zoh":  # the gap is not in the input term: an observation counts once
        weight1 = -torch.expm1(-dt1[..., None] * alpha1) / alpha1
        weight2 = -torch.expm1(-e2) / alpha4
    else:
        weight1, weight2 = dt1[..., None], dt2[..., None]
    b1 = weight1 * B1[..., None, :] * x[..., None]
    b2 = weight2 * B2[..., None, :] * x[..., None]
    h1, h2 = scan2d_reference(torch.exp(-e1), a2, a3, torch.exp(-e2), b1, b2)
    y = (C1[..., None, :] * h1 + C2[..., None, :] * h2).sum(-1)
    return y + per_batch(D, batch)[:, None, None] * x


def per_batch(parameter: Tensor, batch: int, *, repeat: bool = False) -> Tensor:
    """One entry per batch index from one per group, (g, ...) -> (b, ...), where b = g * k.

    Args:
        parameter: Entries per group.
        batch: b.
        repeat: False: each entry for k consecutive indices (parameters); True: all entries once per group (data that
            the groups share).
    """
    times = batch // max(1, parameter.shape[0])
    if repeat:
        return parameter.repeat(times, *(1,) * (parameter.dim() - 1))
    return parameter.repeat_interleave(times, dim=0)
