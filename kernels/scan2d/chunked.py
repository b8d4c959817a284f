"""`scan2d` in plain PyTorch: one step per anti-diagonal of the grid, with the hand-written adjoint.

All cells with i + j = s need only cells with i + j = s - 1, so V + T - 1 steps of whole-tensor arithmetic are exact.
With g1, g2 the gradients that reach h1, h2, the adjoint states run the same steps backwards:

    L1[i,j] = g1[i,j] + a1[i,j+1] L1[i,j+1] + a3[i+1,j] L2[i+1,j]
    L2[i,j] = g2[i,j] + a2[i,j+1] L1[i,j+1] + a4[i+1,j] L2[i+1,j]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import BackendError


def scan2d_chunked(a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """All states (b, i, j, d, n) from coefficients of the same shape, all of one dtype."""
    return scan2d_fwd(a1, a2, a3, a4, b1, b2)


@torch.library.custom_op("ssm::scan2d_fwd", mutates_args=())
def scan2d_fwd(a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """Forward pass; returns (h1, h2), contiguous."""
    a1, a2, a3, a4 = (sliceable(a) for a in (a1, a2, a3, a4))
    h1, h2 = (b.clone(memory_format=torch.contiguous_format) for b in (b1, b2))
    rows, columns = h1.shape[1:3]
    for s in range(1, rows + columns - 1):
        low, last, first, high = spans(s, rows, columns)
        own, other = diagonal(h1, s - 1, low, last), diagonal(h2, s - 1, low, last)
        here = diagonal(h1, s, low, last)
        here.addcmul_(diagonal(a1, s, low, last), own).addcmul_(diagonal(a2, s, low, last), other)
        other, own = diagonal(h1, s - 1, first - 1, high - 1), diagonal(h2, s - 1, first - 1, high - 1)
        here = diagonal(h2, s, first, high)
        here.addcmul_(diagonal(a3, s, first, high), other).addcmul_(diagonal(a4, s, first, high), own)
    return h1, h2


@torch.library.custom_op("ssm::scan2d_bwd", mutates_args=())
def scan2d_bwd(
    a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, h1: Tensor, h2: Tensor, dh1: Tensor, dh2: Tensor
) -> list[Tensor]:
    """Gradients of (a1, a2, a3, a4, b1, b2)."""
    a1, a2, a3, a4 = (sliceable(a) for a in (a1, a2, a3, a4))
    adjoint1, adjoint2 = (dh.clone(memory_format=torch.contiguous_format) for dh in (dh1, dh2))
    rows, columns = h1.shape[1:3]
    for s in range(rows + columns - 2, 0, -1):
        low, last, first, high = spans(s, rows, columns)
        here = diagonal(adjoint1, s, low, last)
        diagonal(adjoint1, s - 1, low, last).addcmul_(diagonal(a1, s, low, last), here)
        diagonal(adjoint2, s - 1, low, last).addcmul_(diagonal(a2, s, low, last), here)
        here = diagonal(adjoint2, s, first, high)
        diagonal(adjoint1, s - 1, first - 1, high - 1).addcmul_(diagonal(a3, s, first, high), here)
        diagonal(adjoint2, s - 1, first - 1, high - 1).addcmul_(diagonal(a4, s, first, high), here)
    da1, da2, da3, da4 = (torch.zeros_like(h1) for _ in range(4))
    torch.mul(adjoint1[:, :, 1:], h1[:, :, :-1], out=da1[:, :, 1:])
    torch.mul(adjoint1[:, :, 1:], h2[:, :, :-1], out=da2[:, :, 1:])
    torch.mul(adjoint2[:, 1:], h1[:, :-1], out=da3[:, 1:])
    torch.mul(adjoint2[:, 1:], h2[:, :-1], out=da4[:, 1:])
    return [da1, da2, da3, da4, adjoint1, adjoint2]


@scan2d_fwd.register_fake
def _(a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    return b1.new_empty(b1.shape), b2.new_empty(b2.shape)


@scan2d_bwd.register_fake
def _(a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, h1: Tensor, h2: Tensor, dh1: Tensor, dh2: Tensor) -> list[Tensor]:
    return [h1.new_empty(h1.shape) for _ in range(6)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)


def _backward(ctx: Any, dh1: Tensor, dh2: Tensor) -> tuple[Tensor, ...]:
    return tuple(scan2d_bwd(*ctx.saved_tensors, dh1, dh2))


def refuse_second_derivative(op: str) -> Any:
    """An autograd formula that says which backend has second derivatives."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise BackendError(f"{op} has no second derivative in backend='chunked'; use backend='reference' for it.")

    return refuse


scan2d_fwd.register_autograd(_backward, setup_context=_save)
scan2d_bwd.register_autograd(refuse_second_derivative("scan2d"))


def spans(s: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Rows of diagonal s: low .. last have a left neighbour, first .. high one above (both ends included)."""
    low, high = max(0, s - columns + 1), min(rows - 1, s)
    return low, min(high, s - 1), max(low, 1), high


def diagonal(t: Tensor, s: int, first: int, last: int) -> Tensor:
    """View of the cells (i, s - i) for rows first .. last of (b, i, j, ...), (b, row, ...)."""
    batch, row, column, *inner = t.stride()
    return t.as_strided(
        (t.shape[0], max(0, last - first + 1), *t.shape[3:]),
        (batch, row - column, *inner),
        t.storage_offset() + first * row + (s - first) * column,
    )


def sliceable(t: Tensor) -> Tensor:
    """`t`, or a contiguous copy where a step down the diagonal would go backwards in memory."""
    # Not contiguous(): with a dimension of size 1 it may return `t` with the same strides.
    return t if t.stride(1) >= t.stride(2) else t.clone(memory_format=torch.contiguous_format)
