"""Fused form of `selective_scan2d` in plain PyTorch, with its hand-written adjoint.

The grid is walked along its anti-diagonals: the cells with i + j = s need only those with i + j = s - 1. With g = a - 1
the coupled step is

    h1 = dt1 B1 x + h1' + g1 (h1' - c2 h2')      (' = the cell to the left)
    h2 = dt2 B2 x + h2' + g2 (h2' - c3 h1')      (' = the cell above)

so one expm1 per state is enough and no precision is lost for small steps. Tensors of a diagonal are (w, n, b, d), w its
cells. The forward pass keeps two diagonals and nothing else of that size; the backward pass computes the states again,
block by block of batch and channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunked import diagonal, refuse_second_derivative, sliceable, spans
from .reference import per_batch

# Largest size of one diagonal of one state tensor in a block. On a CPU a few of them should fit the second-level
# cache; elsewhere the number of launches counts.
CPU_DIAGONAL = 1 << 17
DEVICE_DIAGONAL = 1 << 22
# Largest size of one state tensor of a block; the backward pass holds four of them.
BLOCK = 1 << 24


class Step(NamedTuple):
    """One anti-diagonal: the cells (i, s - i) for rows low .. high.

    `here[k]` are those of its cells whose state k + 1 reads a cell of the diagonal before, and `before[k]` the cells
    read: to the left for h1 (k = 0), above for h2 (k = 1).
    """

    s: int
    low: int
    high: int
    here: tuple[slice, slice]
    before: tuple[slice, slice]

    @property
    def width(self) -> int:
        return self.high - self.low + 1

    def cells(self, t: Tensor) -> Tensor:
        """View of (b, i, j, d) on this diagonal, (w, 1, b, d)."""
        return diagonal(t, self.s, self.low, self.high).transpose(0, 1)[:, None]

    def weights(self, t: Tensor) -> Tensor:
        """View of (b, i, j, n) on this diagonal, (w, n, b, 1)."""
        return diagonal(t, self.s, self.low, self.high).permute(1, 2, 0)[..., None]


@lru_cache(maxsize=64)
def walk(rows: int, columns: int) -> tuple[Step, ...]:
    """The anti-diagonals of a grid, in order."""
    empty = slice(0, 0)
    steps = [Step(0, 0, 0, (empty, empty), (empty, empty))]
    for s in range(1, rows + columns - 1):
        low, last, first, high = spans(s, rows, columns)
        origin = steps[-1].low
        here = slice(0, last - low + 1), slice(first - low, high - low + 1)
        before = slice(low - origin, last - origin + 1), slice(first - 1 - origin, high - origin)
        steps.append(Step(s, low, high, here, before))
    return tuple(steps)


class Terms(NamedTuple):
    """The tensors of the op, or a block of them, or their gradients.

    x, dt, r are (b, i, j, d), B and C (b, i, j, n); alpha and c are (g, d, n), in a block (n, b, d). `r1` is the step
    of the decay along time where it differs from `dt1`; c = kappa tanh(theta) is None where that coupling is off.
    """

    x: Tensor
    dt1: Tensor
    dt2: Tensor
    r1: Tensor | None
    B1: Tensor
    B2: Tensor
    C1: Tensor
    C2: Tensor
    alpha1: Tensor
    alpha4: Tensor
    c2: Tensor | None
    c3: Tensor | None

    @property
    def alpha(self) -> tuple[Tensor, Tensor]:
        return self.alpha1, self.alpha4

    @property
    def c(self) -> tuple[Tensor | None, Tensor | None]:
        return self.c2, self.c3

    @property
    def grid(self) -> tuple[int, int]:
        return self.x.shape[1], self.x.shape[2]

    def present(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors that are not None."""
        return ((name, t) for name, t in self._asdict().items() if t is not None)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Ranges of batch and channels that keep a block to the sizes above."""
        batch, rows, columns, d = self.x.shape
        n = self.alpha1.shape[2]
        limit = CPU_DIAGONAL if self.x.device.type == "cpu" else DEVICE_DIAGONAL
        lanes = min(limit // max(1, min(rows, columns) * n), BLOCK // max(1, rows * columns * n))
        deep = max(1, min(d, lanes))
        wide = max(1, lanes // deep)
        for start in range(0, batch, wide):
            for channel in range(0, d, deep):
                yield slice(start, start + wide), slice(channel, channel + deep)

    def block(self, batch: slice, channels: slice) -> Terms:
        """Views of one block; parameters are spread over the batch."""
        size = self.x.shape[0]
        cut: dict[str, Any] = dict(ABSENT)
        for name, t in self.present():
            index = block_index(name, batch, channels)
            if name in PARAMETERS:
                cut[name] = per_batch(t, size).permute(2, 0, 1)[index].contiguous()
            else:
                cut[name] = sliceable(t[index])
        return Terms(**cut)


PARAMETERS = ("alpha1", "alpha4", "c2", "c3")
PROJECTIONS = ("B1", "B2", "C1", "C2")
ABSENT: dict[str, Any] = {"r1": None, "c2": None, "c3": None}
States = tuple[Tensor, ...]  # h1, h2 and g1, g2 (decay minus one) on one diagonal


def block_index(name: str, batch: slice, channels: slice) -> tuple[Any, ...]:
    """Index of a block in a tensor of the op; parameters as (n, b, d)."""
    if name in PARAMETERS:
        return slice(None), batch, channels
    return (batch,) if name in PROJECTIONS else (batch, ..., channels)


class Cells(NamedTuple):
    """What one diagonal takes in, copied to contiguous memory: its rows lie far apart and are read many times.

    x, dt, r (w, 1, b, d); B, C (w, n, b, 1). Pairs are for h1 and h2.
    """

    x: Tensor
    dt: tuple[Tensor, Tensor]
    r: tuple[Tensor, Tensor]
    B: tuple[Tensor, Tensor]
    C: tuple[Tensor, Tensor]


def read_cells(t: Terms, step: Step) -> Cells:
    """Copy the inputs of one diagonal."""
    x, dt1, dt2 = (step.cells(tensor).contiguous() for tensor in (t.x, t.dt1, t.dt2))
    r1 = dt1 if t.r1 is None else step.cells(t.r1).contiguous()
    B1, B2, C1, C2 = (step.weights(tensor).contiguous() for tensor in (t.B1, t.B2, t.C1, t.C2))
    return Cells(x, (dt1, dt2), (r1, dt2), (B1, B2), (C1, C2))


def advance(
    t: Terms, step: Step, cells: Cells, states: States, before: States | None, rates: tuple[Tensor, Tensor], held: bool
) -> None:
    """Fill the states of one diagonal from those of the one before."""
    for k in (0, 1):
        h, g, dt = states[k], states[2 + k], cells.dt[k]
        torch.mul(cells.x if held else dt * cells.x, cells.B[k], out=h)
        if held:
            h *= held_weight(dt, t.alpha[k])
        if before is None:
            continue
        here = step.here[k]
        own, other = before[k][step.before[k]], before[1 - k][step.before[k]]
        h, g, c = h[here], g[here], t.c[k]
        torch.mul(cells.r[k][here], rates[k], out=g)
        g.expm1_()
        h += own
        h.addcmul_(g, own if c is None else torch.addcmul(own, c, other, value=-1))


def held_weight(dt: Tensor, alpha: Tensor) -> Tensor:
    """(1 - exp(-dt alpha)) / alpha, the weight of an input that is held for a step dt."""
    return torch.mul(dt, -alpha).expm1_().div_(-alpha)


def forward_block(t: Terms, y: Tensor, held: bool) -> None:
    """Write y = sum over n of C1 h1 + C2 h2 for one block."""
    widest = min(t.grid)
    memory = t.x.new_empty(2, 4, widest, *t.alpha1.shape)  # this diagonal and the one before take turns
    rates = -t.alpha1, -t.alpha4
    before: States | None = None
    for step in walk(*t.grid):
        cells = read_cells(t, step)
        states = memory[step.s % 2, :, : step.width].unbind(0)
        advance(t, step, cells, states, before, rates, held)
        terms = (cells.C[0] * states[0]).addcmul_(cells.C[1], states[1])
        step.cells(y).copy_(terms.sum(1, keepdim=True))
        before = states


def all_states(t: Terms, held: bool) -> list[States]:
    """The states of every diagonal of a block."""
    rows, columns = t.grid
    memory = t.x.new_empty(4, rows * columns, *t.alpha1.shape)
    rates = -t.alpha1, -t.alpha4
    found: list[States] = []
    start = 0
    for step in walk(rows, columns):
        states = memory[:, start : start + step.width].unbind(0)
        advance(t, step, read_cells(t, step), states, found[-1] if found else None, rates, held)
        found.append(states)
        start += step.width
    return found


def backward_block(t: Terms, dy: Tensor, grad: Terms, held: bool) -> None:
    """Gradients of one block: written for x and the steps, added for the rest; `grad` are views of zeros."""
    steps = walk(*t.grid)
    states = all_states(t, held)
    widest = min(t.grid)
    memory = t.x.new_empty(2, 2, widest, *t.alpha1.shape)  # adjoint states of this diagonal and of the one before
    scratch = t.x.new_empty(3, widest, *t.alpha1.shape)
    cells, dy_here = read_cells(t, steps[-1]), steps[-1].cells(dy).contiguous()
    adjoint = output_adjoint(cells, dy_here, memory[0])
    for step in reversed(steps):
        work = scratch[0, : step.width]
        dx, ddt = input_adjoint(t, step, cells, states[step.s], adjoint, dy_here, grad, held, work)
        dr = ddt if grad.r1 is None else [torch.zeros_like(ddt[0]), ddt[1]]
        if step.s > 0:
            step_before = steps[step.s - 1]
            cells_before, dy_here = read_cells(t, step_before), step_before.cells(dy).contiguous()
            origin = output_adjoint(cells_before, dy_here, memory[(len(steps) - step.s) % 2])
            state_adjoint(t, step, cells, states[step.s], states[step.s - 1], adjoint, origin, dr, grad, scratch)
            cells, adjoint = cells_before, origin
        written = [(grad.x, dx), (grad.dt1, ddt[0]), (grad.dt2, ddt[1])]
        for target, value in written if grad.r1 is None else [*written, (grad.r1, dr[0])]:
            step.cells(target).copy_(value)


def output_adjoint(cells: Cells, dy: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """What the output of a diagonal sends to its own states."""
    width = cells.x.shape[0]
    adjoint = memory[0, :width], memory[1, :width]
    for k in (0, 1):
        torch.mul(cells.C[k], dy, out=adjoint[k])
    return adjoint


def input_adjoint(
    t: Terms,
    step: Step,
    cells: Cells,
    states: States,
    adjoint: tuple[Tensor, Tensor],
    dy: Tensor,
    grad: Terms,
    held: bool,
    work: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x and of dt (as it enters the input term) on one diagonal; those of B and C are added to `grad`."""
    x, dx, found = cells.x, torch.zeros_like(cells.x), []
    for k, dB, dC, dalpha in ((0, grad.B1, grad.C1, grad.alpha1), (1, grad.B2, grad.C2, grad.alpha4)):
        step.weights(dC).add_(torch.mul(dy, states[k], out=work).sum(3, keepdim=True))
        dt, B, here, alpha = cells.dt[k], cells.B[k], adjoint[k], t.alpha[k]
        if held:
            weight = held_weight(dt, alpha)
            decay = 1 - alpha * weight
            dweight = torch.mul(here, x, out=work).mul_(B)
            ddt = (dweight * decay).sum(1, keepdim=True)
            dalpha += dweight.mul_(decay.mul_(dt).sub_(weight)).sum(0).div_(alpha)
            here = weight.mul_(here)
        du = torch.mul(here, B, out=work).sum(1, keepdim=True)
        if held:
            dx += du
        else:
            dx.addcmul_(du, dt)
            ddt = du * x
        step.weights(dB).add_(torch.mul(here, x if held else dt * x, out=work).sum(3, keepdim=True))
        found.append(ddt)
    return dx, found


def state_adjoint(
    t: Terms,
    step: Step,
    cells: Cells,
    states: States,
    before: States,
    adjoint: tuple[Tensor, Tensor],
    origin: tuple[Tensor, Tensor],
    dr: list[Tensor],
    grad: Terms,
    scratch: Tensor,
) -> None:
    """Hand the adjoint states of a diagonal on to the one before; add the gradients of the decays and couplings."""
    for k in (0, 1):
        here, read = step.here[k], step.before[k]
        own, other, c, dc = before[k][read], before[1 - k][read], t.c[k], grad.c[k]
        coupled, kept, work = scratch[:, here].unbind(0)
        torch.mul(states[2 + k][here], adjoint[k][here], out=coupled)
        torch.add(coupled, adjoint[k][here], out=kept)
        origin[k][read].add_(kept)
        if c is None or dc is None:
            kept *= own
        else:
            origin[1 - k][read].addcmul_(c, coupled, value=-1)
            kept *= torch.addcmul(own, c, other, value=-1, out=work)
            dc -= coupled.mul_(other).sum(0)
        # dg/dr = -alpha (1 + g), and the 1 + g is already in `kept`.
        dr[k][here] -= torch.mul(kept, t.alpha[k], out=work).sum(1, keepdim=True)
        grad.alpha[k].sub_(kept.mul_(cells.r[k][here]).sum(0))


@torch.library.custom_op("ssm::selective_scan2d_fwd", mutates_args=())
def selective_scan2d_fwd(
    x: Tensor,
    dt1: Tensor,
    dt2: Tensor,
    r1: Tensor | None,
    B1: Tensor,
    B2: Tensor,
    C1: Tensor,
    C2: Tensor,
    alpha1: Tensor,
    alpha4: Tensor,
    c2: Tensor | None,
    c3: Tensor | None,
    held: bool,
) -> Tensor:
    """Forward pass without the skip term, contiguous."""
    terms = Terms(x, dt1, dt2, r1, B1, B2, C1, C2, alpha1, alpha4, c2, c3)
    y = x.new_empty(x.shape)
    for batch, channels in terms.blocks():
        forward_block(terms.block(batch, channels), y[batch, ..., channels], held)
    return y


@torch.library.custom_op("ssm::selective_scan2d_bwd", mutates_args=())
def selective_scan2d_bwd(
    dy: Tensor,
    x: Tensor,
    dt1: Tensor,
    dt2: Tensor,
    r1: Tensor | None,
    B1: Tensor,
    B2: Tensor,
    C1: Tensor,
    C2: Tensor,
    alpha1: Tensor,
    alpha4: Tensor,
    c2: Tensor | None,
    c3: Tensor | None,
    held: bool,
) -> list[Tensor]:
    """Gradients of those tensors that are not None, in order."""
    terms = Terms(x, dt1, dt2, r1, B1, B2, C1, C2, alpha1, alpha4, c2, c3)
    dy = sliceable(dy)
    batch = x.shape[0]
    # Parameters first get one gradient per batch index, (n, b, d): blocks then never share an entry.
    grad = {
        name: x.new_zeros(t.shape[2], batch, t.shape[1]) if name in PARAMETERS else x.new_zeros(t.shape)
        for name, t in terms.present()
    }
    for rows, channels in terms.blocks():
        cut = {name: t[block_index(name, rows, channels)] for name, t in grad.items()}
        part = Terms(**ABSENT | cut)
        backward_block(terms.block(rows, channels), dy[rows, ..., channels], part, held)
    groups = alpha1.shape[0]
    return [
        t.unflatten(1, (groups, -1)).sum(2).permute(1, 2, 0).contiguous() if name in PARAMETERS else t
        for name, t in grad.items()
    ]


@selective_scan2d_fwd.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@selective_scan2d_bwd.register_fake
def _(dy: Tensor, *inputs: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs[:-1] if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.held = inputs[-1]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes at the first access and refuses another
    gradients = iter(selective_scan2d_bwd(dy, *saved, ctx.held))
    return *(None if t is None else next(gradients) for t in saved), None


selective_scan2d_fwd.register_autograd(_backward, setup_context=_save)
selective_scan2d_bwd.register_autograd(refuse_second_derivative("selective_scan2d"))


def selective_scan2d_chunked(terms: Terms, *, held: bool) -> Tensor:
    """y without the skip term, (b, i, j, d); all tensors of one dtype, float32 or float64.

    Args:
        terms: The tensors.
        held: True for the zero-order hold of the input, False for the Euler form.
    """
    return selective_scan2d_fwd(*terms, held)
