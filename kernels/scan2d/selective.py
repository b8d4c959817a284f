"""Fused form of `selective_scan2d` in plain PyTorch, with its hand-written adjoint.

The grid is walked along its anti-diagonals: the cells with i + j = s need only those with i + j = s - 1. Tensors are
packed in that order, `(cell, n, d, b)`, so that each diagonal and what it reads are contiguous and every sum but the
one over the batch runs over an outer dimension. With g = a - 1 the coupled step is

    h1 = u1 B1 + h1' + g1 (h1' - c2 h2')      (' = the cell to the left)
    h2 = u2 B2 + h2' + g2 (h2' - c3 h1')      (' = the cell above)

so one expm1 per state is enough and no precision is lost for small steps. The forward pass keeps nothing of size
(b, i, j, d, n): the backward pass computes the states again, block by block of batch and channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunked import refuse_second_derivative, spans
from .reference import per_batch

# Largest size of one diagonal of one state tensor in a block. On a CPU a few of them should fit the second-level
# cache; elsewhere the number of launches counts.
CPU_DIAGONAL = 1 << 17
DEVICE_DIAGONAL = 1 << 22
# Largest size of one state tensor of a block; the backward pass holds six of them.
BLOCK = 1 << 25


class Terms(NamedTuple):
    """The tensors of the op, or one packed block of them, or the gradients of either.

    r is the step of the decays (dt times the gap); u is dt x and s is None in the Euler form of the input term, u is x
    and s is dt in the zero-order hold. `c2`, `c3` (kappa tanh theta) are None where the coupling is off.

    In the op u, r, s are (b, i, j, d), B and C (b, i, j, n), the other four parameters (g, d, n). Terms they are
    (cell, 1, d, b), (cell, n, 1, b) and (n, d, b).
    """

    u1: Tensor
    u2: Tensor
    r1: Tensor
    r2: Tensor
    s1: Tensor | None
    s2: Tensor | None
    B1: Tensor
    B2: Tensor
    C1: Tensor
    C2: Tensor
    alpha1: Tensor
    alpha4: Tensor
    c2: Tensor | None
    c3: Tensor | None


class States(NamedTuple):
    """States h and decays minus one g of a block, (cell, n, d, b)."""

    h1: Tensor
    h2: Tensor
    g1: Tensor
    g2: Tensor


class Diagonal(NamedTuple):
    """Cells with i + j = s, as ranges of packed cells."""

    cells: slice
    has_left: slice  # the cells with a left neighbour ...
    left: slice  # ... and these neighbours, on the diagonal before
    has_above: slice
    above: slice


@cache
def diagonals(rows: int, columns: int) -> tuple[Diagonal, ...]:
    """The anti-diagonals of a grid in order; cells are packed diagonal by diagonal, by row within each."""
    found = []
    start, before = 0, 0  # packed position of row 0, were it on this diagonal; the same for the diagonal before
    for s in range(rows + columns - 1):
        low, last, first, high = spans(s, rows, columns)
        start -= low
        found.append(
            Diagonal(
                cells=slice(start + low, start + high + 1),
                has_left=slice(start + low, start + last + 1),
                left=slice(before + low, before + last + 1),
                has_above=slice(start + first, start + high + 1),
                above=slice(before + first - 1, before + high),
            )
            if s > 0
            else Diagonal(slice(0, 1), *[slice(0, 0)] * 4)
        )
        start, before = start + high + 1, start
    return tuple(found)


@cache
def packing(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions i * columns + j in packed order, and the inverse permutation."""
    order = [i * columns + s - i for s in range(rows + columns - 1) for i in range(rows) if 0 <= s - i < columns]
    packed = torch.tensor(order, device=device)
    return packed, torch.argsort(packed)


def block_states(p: Terms, order: tuple[Diagonal, ...]) -> States:
    """Run the recurrence over one block."""
    shape = (p.u1.shape[0], *p.alpha1.shape)
    h1, h2, g1, g2 = (p.u1.new_empty(shape) for _ in range(4))
    rate1, rate4 = -p.alpha1, -p.alpha4
    for cells, has_left, left, has_above, above in order:
        torch.mul(p.u1[cells], p.B1[cells], out=h1[cells])
        torch.mul(p.u2[cells], p.B2[cells], out=h2[cells])
        if p.s1 is not None and p.s2 is not None:
            h1[cells] *= held_weight(p.s1[cells], p.alpha1)
            h2[cells] *= held_weight(p.s2[cells], p.alpha4)
        advance(h1[has_left], g1[has_left], p.r1[has_left], rate1, h1[left], p.c2, h2[left])
        advance(h2[has_above], g2[has_above], p.r2[has_above], rate4, h2[above], p.c3, h1[above])
    return States(h1, h2, g1, g2)


def advance(h: Tensor, g: Tensor, r: Tensor, rate: Tensor, own: Tensor, c: Tensor | None, other: Tensor) -> None:
    """h += own + g (own - c other) with g = exp(r rate) - 1, in place."""
    torch.mul(r, rate, out=g)
    g.expm1_()
    h.add_(own).addcmul_(g, own if c is None else torch.addcmul(own, c, other, value=-1))


def held_weight(s: Tensor, alpha: Tensor) -> Tensor:
    """(1 - exp(-s alpha)) / alpha, the weight of an input that is held for a step s."""
    return torch.mul(s, -alpha).expm1_().div_(-alpha)


def block_output(p: Terms, states: States, order: tuple[Diagonal, ...]) -> Tensor:
    """y = sum over n of C1 h1 + C2 h2, packed (cell, d, b)."""
    y = p.u1.new_empty(p.u1.shape[0], *p.u1.shape[2:])
    for cells, *_ in order:
        terms = (p.C1[cells] * states.h1[cells]).addcmul_(p.C2[cells], states.h2[cells])
        torch.sum(terms, 1, out=y[cells])
    return y


def block_adjoint(p: Terms, states: States, dy: Tensor, order: tuple[Diagonal, ...]) -> Terms:
    """Run the adjoint recurrence over one block; `dy` is packed, (cell, 1, d, b)."""
    grad = Terms(*(None if tensor is None else torch.zeros_like(tensor) for tensor in p))  # type: ignore[arg-type]
    h1, h2, g1, g2 = states
    adjoint1, adjoint2 = p.C1 * dy, p.C2 * dy
    for cells, has_left, left, has_above, above in reversed(order):
        for adjoint, h, u, B, s, alpha, du, dB, dC, ds, dalpha in (
            (adjoint1, h1, p.u1, p.B1, p.s1, p.alpha1, grad.u1, grad.B1, grad.C1, grad.s1, grad.alpha1),
            (adjoint2, h2, p.u2, p.B2, p.s2, p.alpha4, grad.u2, grad.B2, grad.C2, grad.s2, grad.alpha4),
        ):
            torch.sum(dy[cells] * h[cells], 2, keepdim=True, out=dC[cells])
            here = adjoint[cells]
            if s is not None and ds is not None:
                weight = held_weight(s[cells], alpha)
                decay = 1 - alpha * weight
                dweight = (here * u[cells]).mul_(B[cells])
                torch.sum(dweight * decay, 1, keepdim=True, out=ds[cells])
                dalpha += dweight.mul_(decay.mul_(s[cells]).sub_(weight)).sum(0).div_(alpha)
                here = weight.mul_(here)
            torch.sum(here * B[cells], 1, keepdim=True, out=du[cells])
            torch.sum(here * u[cells], 2, keepdim=True, out=dB[cells])
        retreat(
            adjoint1[has_left], g1[has_left], p.r1[has_left], p.alpha1, h1[left], p.c2, h2[left],
            adjoint1[left], adjoint2[left], grad.r1[has_left], grad.alpha1, grad.c2,
        )  # fmt: skip
        retreat(
            adjoint2[has_above], g2[has_above], p.r2[has_above], p.alpha4, h2[above], p.c3, h1[above],
            adjoint2[above], adjoint1[above], grad.r2[has_above], grad.alpha4, grad.c3,
        )  # fmt: skip
    return grad


def retreat(
    adjoint: Tensor,
    g: Tensor,
    r: Tensor,
    alpha: Tensor,
    own: Tensor,
    c: Tensor | None,
    other: Tensor,
    adjoint_own: Tensor,
    adjoint_other: Tensor,
    dr: Tensor,
    dalpha: Tensor,
    dc: Tensor | None,
) -> None:
    """Adjoint of `advance`: hand `adjoint` on to the states that were read, and add up the gradients; in place."""
    coupled = g * adjoint
    kept = coupled + adjoint
    adjoint_own += kept
    if c is None or dc is None:
        kept *= own
    else:
        adjoint_other.addcmul_(c, coupled, value=-1)
        kept *= torch.addcmul(own, c, other, value=-1)
        dc -= coupled.mul_(other).sum(0)
    # dg/dr = -alpha (1 + g): `kept` now holds minus the gradient of the exponent r alpha.
    torch.sum(kept * alpha, 1, keepdim=True, out=dr)
    dr.neg_()
    dalpha -= kept.mul_(r).sum(0)


def blocks(rows: int, columns: int, batch: int, d: int, n: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut batch and channels so that a block keeps to the sizes above; the batch is the vector dimension, cut last."""
    limit = CPU_DIAGONAL if device.type == "cpu" else DEVICE_DIAGONAL
    lanes = max(1, min(limit // (min(rows, columns) * n), BLOCK // (rows * columns * n)))
    wide = min(batch, lanes)
    deep = min(d, max(1, lanes // wide))
    for start in range(0, batch, wide):
        for channel in range(0, d, deep):
            yield slice(start, start + wide), slice(channel, channel + deep)


def pack(t: Tensor, order: Tensor) -> Tensor:
    """(b, i, j, c) -> (cell, c, b)."""
    batch, rows, columns, channels = t.shape
    return t.flatten(1).t().contiguous().view(rows * columns, channels, batch).index_select(0, order)


def unpack(t: Tensor, inverse: Tensor, rows: int, columns: int) -> Tensor:
    """(cell, c, b) -> (b, i, j, c)."""
    channels, batch = t.shape[1:]
    return t.index_select(0, inverse).flatten(0, 1).t().contiguous().view(batch, rows, columns, channels)


def pack_block(t: Terms, batch: slice, channels: slice, order: Tensor) -> Terms:
    """Cut one block out of the tensors of the op and pack it."""

    def grid(name: str) -> Tensor | None:
        value = getattr(t, name)
        return None if value is None else pack(value[batch, ..., channels], order)[:, None]

    def weights(name: str) -> Tensor:
        return pack(getattr(t, name)[batch], order)[:, :, None]

    def parameter(name: str) -> Tensor | None:
        value = getattr(t, name)
        if value is None:
            return None
        return per_batch(value, t.u1.shape[0])[batch, channels].permute(2, 1, 0).contiguous()

    made: dict[str, Any] = {name: grid(name) for name in ("u1", "u2", "r1", "r2", "s1", "s2")}
    made |= {name: weights(name) for name in ("B1", "B2", "C1", "C2")}
    made |= {name: parameter(name) for name in ("alpha1", "alpha4", "c2", "c3")}
    return Terms(**made)


def selective_scan2d_chunked(terms: Terms) -> Tensor:
    """y without the skip term, (b, i, j, d); all tensors of one dtype, float32 or float64."""
    return selective_scan2d_fwd(*terms)


@torch.library.custom_op("ssm::selective_scan2d_fwd", mutates_args=())
def selective_scan2d_fwd(
    u1: Tensor,
    u2: Tensor,
    r1: Tensor,
    r2: Tensor,
    s1: Tensor | None,
    s2: Tensor | None,
    B1: Tensor,
    B2: Tensor,
    C1: Tensor,
    C2: Tensor,
    alpha1: Tensor,
    alpha4: Tensor,
    c2: Tensor | None,
    c3: Tensor | None,
) -> Tensor:
    """Forward pass, contiguous."""
    terms = Terms(u1, u2, r1, r2, s1, s2, B1, B2, C1, C2, alpha1, alpha4, c2, c3)
    size, d = u1.shape[0], u1.shape[3]
    rows, columns = u1.shape[1:3]
    order, inverse = packing(rows, columns, u1.device)
    walk = diagonals(rows, columns)
    y = u1.new_empty(u1.shape)
    for batch, channels in blocks(rows, columns, size, d, alpha1.shape[2], u1.device):
        block = pack_block(terms, batch, channels, order)
        y[batch, ..., channels] = unpack(block_output(block, block_states(block, walk), walk), inverse, rows, columns)
    return y


@torch.library.custom_op("ssm::selective_scan2d_bwd", mutates_args=())
def selective_scan2d_bwd(
    dy: Tensor,
    u1: Tensor,
    u2: Tensor,
    r1: Tensor,
    r2: Tensor,
    s1: Tensor | None,
    s2: Tensor | None,
    B1: Tensor,
    B2: Tensor,
    C1: Tensor,
    C2: Tensor,
    alpha1: Tensor,
    alpha4: Tensor,
    c2: Tensor | None,
    c3: Tensor | None,
) -> list[Tensor]:
    """Gradients of those tensors that are not None, in order."""
    terms = Terms(u1, u2, r1, r2, s1, s2, B1, B2, C1, C2, alpha1, alpha4, c2, c3)
    size, d = u1.shape[0], u1.shape[3]
    rows, columns = u1.shape[1:3]
    order, inverse = packing(rows, columns, u1.device)
    walk = diagonals(rows, columns)
    grad = {name: torch.zeros_like(t, memory_format=torch.contiguous_format) for name, t in present(terms)}
    groups = alpha1.shape[0]
    for batch, channels in blocks(rows, columns, size, d, alpha1.shape[2], u1.device):
        block = pack_block(terms, batch, channels, order)
        packed_dy = pack(dy[batch, ..., channels], order)[:, None]
        for name, t in present(block_adjoint(block, block_states(block, walk), packed_dy, walk)):
            if name in ("alpha1", "alpha4", "c2", "c3"):
                group = torch.arange(size, device=u1.device)[batch] // (size // groups)
                grad[name][:, channels].index_add_(0, group, t.permute(2, 1, 0))
            elif name in ("B1", "B2", "C1", "C2"):
                grad[name][batch] += unpack(t[:, :, 0], inverse, rows, columns)
            else:
                grad[name][batch, ..., channels] = unpack(t[:, 0], inverse, rows, columns)
    return list(grad.values())


def present(terms: Terms) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that are not None."""
    return ((name, t) for name, t in terms._asdict().items() if t is not None)


@selective_scan2d_fwd.register_fake
def _(u1: Tensor, *_: Tensor | None) -> Tensor:
    return u1.new_empty(u1.shape)


@selective_scan2d_bwd.register_fake
def _(dy: Tensor, *terms: Tensor | None) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in terms if t is not None]


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gradients = iter(selective_scan2d_bwd(dy, *ctx.saved_tensors))
    return tuple(None if t is None else next(gradients) for t in ctx.saved_tensors)


selective_scan2d_fwd.register_autograd(_backward, setup_context=_save)
selective_scan2d_bwd.register_autograd(refuse_second_derivative("selective_scan2d"))
