"""Other forms of the grid recurrence of `Chimera2D`: as a convolution, with companion matrices, and with rotation.

Constant parameters make the model a convolution over both axes, y = K * u, with K the response of the recurrence to a
single 1 in the first cell. A companion matrix holds an autoregression along time exactly. A rotation lets states
oscillate, which a real diagonal matrix cannot. Columns are walked in order; within one, the state along variates is a
linear scan:

    h1[i,j] = carry(h1[i,j-1], h2[i,j-1]) + b1[i,j]
    h2[i,j] = a3[i,j] h1[i-1,j] + a4[i,j] h2[i-1,j] + b2[i,j]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import Backend, linear_scan
from .companion import companion_matrix, unit_norm

__all__ = ["companion_response", "convolve_grid", "scan_columns", "scan_rotating"]

MATRIX_CELLS = 256  # of a grid up to which the convolution is one matrix product per channel; behind it, an FFT


def scan_columns(
    carry: Callable[[int, Tensor, Tensor], Tensor],
    a3: Tensor | None,
    a4: Tensor,
    b1: Tensor,
    b2: Tensor,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """States h1 and h2, (b, i, j, d, n), real or complex as b1 and b2 are.

    Args:
        carry: What column j of h1 takes over, from j and the columns (b, i, d, n) of h1 and h2 before it.
        a3: (b, i, j, d, n) or broadcasting to it; None: h1 does not enter h2.
        a4: The same.
        b1: Inputs of h1, (b, i, j, d, n).
        b2: Inputs of h2.
        backend: Of the linear scan.
    """
    shape = b1.shape
    a4 = a4.expand(shape).to(b2.dtype)
    a3 = None if a3 is None else a3.expand(shape)
    found: list[tuple[Tensor, Tensor]] = []
    for j in range(shape[2]):
        h1 = b1[:, :, j]
        if found:
            h1 = h1 + carry(j, *found[-1])
        entering = b2[:, :, j]
        if a3 is not None:
            above = torch.cat([torch.zeros_like(h1[:, :1]), h1[:, :-1]], dim=1)
            entering = entering + a3[:, :, j] * above
        h2, _ = linear_scan(a4[:, :, j].flatten(2), entering.flatten(2), backend=backend)
        found.append((h1, h2.unflatten(2, shape[3:])))
    return torch.stack([h for h, _ in found], dim=2), torch.stack([h for _, h in found], dim=2)


def scan_rotating(
    u: Tensor,
    dt1: Tensor,
    dt2: Tensor,
    rate: Tensor,
    speed: Tensor,
    phase: Tensor,
    alpha4: Tensor,
    c2: Tensor,
    c3: Tensor | None,
    maps: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    held: bool = False,
    time_gap: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The selective recurrence whose states along time turn: a1 = exp(dt1 (-rate + i speed)).

        a2 = c2 rate (a1 - 1) / (-rate + i speed),   y = sum_n C1 Re(exp(i phase) h1) + C2 Re(h2)

    |a2| <= |c2| (1 - |a1|), so the states are bounded as without rotation.

    Args:
        u: Inputs, (b, i, j, d).
        dt1: Steps along time, (b, i, j, d).
        dt2: Steps along variates.
        rate: Decay along time, positive; as all parameters below broadcasting to (b, i, j, d, n).
        speed: Angle per unit of dt1.
        phase: Angle at which h1 is read.
        alpha4: Decay along variates, positive.
        c2: Coupling of h2 into h1, in [-1, 1].
        c3: Coupling of h1 into h2, in [-1, 1]; None for none.
        maps: B1, B2, C1, C2, each (b, i, j, n).
        held: Hold the input over a step instead of the Euler form.
        time_gap: Time since the token before, (b, j).
        backend: Of the linear scan.

    Returns:
        (b, i, j, d), without a skip.
    """
    B1, B2, C1, C2 = (m[..., None, :] for m in maps)
    dt1, dt2, u = dt1[..., None], dt2[..., None], u[..., None]
    elapsed = dt1 if time_gap is None else dt1 * time_gap[:, None, :, None, None].to(dt1.dtype)
    turn = torch.complex(-rate, speed)
    a1 = torch.exp(elapsed * turn)
    a2 = c2 * rate * (a1 - 1) / turn
    a4 = torch.exp(-dt2 * alpha4)
    a3 = None if c3 is None else c3 * (1 - a4)
    gain1, gain2 = dt1, dt2
    if held:
        gain1, gain2 = torch.expm1(dt1 * turn) / turn, -torch.expm1(-dt2 * alpha4) / alpha4
    b1, b2 = (gain1 * B1 * u).to(a1.dtype), (gain2 * B2 * u).to(a1.dtype)
    shape = torch.broadcast_shapes(a1.shape, b1.shape)
    a1, a2 = a1.expand(shape), a2.expand(shape)

    def carry(j: int, h1: Tensor, h2: Tensor) -> Tensor:
        return a1[:, :, j] * h1 + a2[:, :, j] * h2

    h1, h2 = scan_columns(carry, a3, a4, b1.expand(shape), b2.expand(shape), backend)
    turned = h1.real * torch.cos(phase) - h1.imag * torch.sin(phase)
    return (C1 * turned + C2 * h2.real).sum(-1)


def companion_response(
    a1: Tensor,
    a2: Tensor | None,
    share: Tensor,
    a3: Tensor | None,
    a4: Tensor,
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    grid: tuple[int, int],
    backend: Backend = "auto",
) -> Tensor:
    """Response (g, i, j, d) of the recurrence with companion matrices along time to a 1 in the first cell.

        h1[j] = share A(a1) h1[j-1] + (1 - share) A(a2) h2[j-1] + B1 u

    A(a) has ones below its diagonal and `a`, divided by its 1-norm, as its last column; no state grows.

    Args:
        a1: Coefficients of the autoregression, (g, d, n).
        a2: Those of what h2 hands over; None: nothing, and `share` is 1.
        share: In (0, 1), (g, d, 1).
        a3: Coupling of h1 into h2, (g, d, n); None for none.
        a4: Decay along variates, in (0, 1), (g, d, n).
        B: Input maps of h1 and h2, (g, d, n); divided by their 1-norms.
        C: Output maps.
        grid: Rows i and columns j.
        backend: Of the linear scan.
    """
    first = companion_matrix(unit_norm(a1)) if a2 is None else share[..., None] * companion_matrix(unit_norm(a1))
    second = None if a2 is None else (1 - share)[..., None] * companion_matrix(unit_norm(a2))

    def carry(j: int, h1: Tensor, h2: Tensor) -> Tensor:
        kept = torch.einsum("gdnm,gidm->gidn", first, h1)
        return kept if second is None else kept + torch.einsum("gdnm,gidm->gidn", second, h2)

    rows, columns = grid
    b1, b2 = (F.pad(unit_norm(b)[:, None, None], (0, 0, 0, 0, 0, columns - 1, 0, rows - 1)) for b in B)
    a3 = None if a3 is None else a3[:, None, None]
    h1, h2 = scan_columns(carry, a3, a4[:, None, None], b1, b2, backend)
    return (h1 * C[0][:, None, None] + h2 * C[1][:, None, None]).sum(-1)


def convolve_grid(u: Tensor, kernel: Tensor) -> Tensor:
    """Convolution over the grid, causal along j and two-sided along i.

        y[h,b,i,j,d] = sum over i', j' <= j of kernel[h, i - i' + V - 1, j - j', d] u[h,b,i',j',d]

    Args:
        u: (h, b, i, j, d).
        kernel: (h, 2 V - 1, j, d) with V rows of `u`; its middle row acts within a variate.

    Returns:
        (h, b, i, j, d) in the dtype of `kernel`.
    """
    rows, columns = u.shape[2:4]
    u = u.to(kernel.dtype)
    with torch.autocast(u.device.type, enabled=False):
        if rows * columns <= MATRIX_CELLS:
            i, j = torch.arange(rows, device=u.device), torch.arange(columns, device=u.device)
            up, back = i[:, None] - i + rows - 1, j[:, None] - j
            matrix = kernel[:, up[:, None, :, None], back.clamp(min=0)[None, :, None, :]]  # (h, i, j, i', j', d)
            matrix = torch.where((back >= 0)[:, None, :, None], matrix, torch.zeros_like(matrix))
            matrix = matrix.permute(0, 5, 1, 2, 3, 4).flatten(4, 5).flatten(2, 3)  # (h, d, cells, cells)
            y = matrix @ u.permute(0, 4, 2, 3, 1).flatten(2, 3)
            return y.unflatten(2, (rows, columns)).permute(0, 4, 2, 3, 1)
        size = (3 * rows - 2, 2 * columns - 1)
        spectrum = torch.fft.rfft2(u, s=size, dim=(2, 3)) * torch.fft.rfft2(kernel[:, None], s=size, dim=(2, 3))
        y = torch.fft.irfft2(spectrum, s=size, dim=(2, 3))
        return y[:, :, rows - 1 : 2 * rows - 1, :columns]
