"""One position after another on a CPU, where a position has numbers enough to outweigh the dispatch of an operation.

A few positions at a time, a piece, have their decays, inputs and outputs formed by single operations, between which the
numbers stay in the cache; only the recurrence itself takes positions one by one. Going backward the states of one tile
at a time are formed again from the saved one; see `chunked.py` for the formulas.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# exp(dt A) near 1 is rounded by up to 2^-25, the same way at each step of equal length. Over so many positions this
# stays below 3.1e-5 of a state that keeps everything; where states live longer expm1 is taken, which needs six times as
# long.
_EXP_POSITIONS = 1024
# Numbers of a piece, (positions, rows, states, channels).
_PIECE = 1 << 17


def lives_long(dt: Tensor, A: Tensor) -> bool:
    """Whether a state may keep more than 1 / e of what it was over `_EXP_POSITIONS` positions.

    Any so many positions hold all of one of the half as long stretches whose sums are taken here.

    Args:
        dt: Steps, (l, b, g, d).
        A: Rates, (g, n, d).
    """
    stretch = max(1, _EXP_POSITIONS // 2)
    if dt.shape[0] <= _EXP_POSITIONS:
        return False
    whole = dt[: dt.shape[0] // stretch * stretch].to(A.real.dtype).unflatten(0, (-1, stretch))
    exponents = whole.sum(1).amin((0, 1)) * -A.real.amax(1)  # (g, d)
    return not bool((exponents >= 1).all())


class Decay:
    """Multiplies states by exp(dt A), and by 0 where a sequence starts; holds the buffers of a block.

    Args:
        A: Rates, (g, n, d).
        precise: Whether decays are held as expm1(dt A).
        batch: Rows.
        positions: Positions that are held at a time.
    """

    def __init__(self, A: Tensor, precise: bool, batch: int, positions: int) -> None:
        self.A, self.precise = A, precise
        self.function = torch.expm1 if precise else torch.exp
        self.states, self.held = A.new_empty(positions + 1, batch, *A.shape), A.new_empty(positions, batch, *A.shape)
        self.steps = list(zip(self.held.unbind(0), *zip(*itertools.pairwise(self.states.unbind(0)))))

    def gates(self, dt: Tensor, keep: Tensor | None, out: Tensor) -> None:
        """exp(dt A), minus 1 if precise; dt (t, b, g, 1, d), keep (t, b, g, 1, 1), out (t, b, g, n, d)."""
        torch.mul(dt, self.A, out=out)
        self.function(out, out=out)
        if keep is not None:
            out.masked_fill_(keep == 0, -1.0 if self.precise else 0.0)

    def add(self, gate: Tensor, h: Tensor, out: Tensor) -> None:
        """Add the decayed state `h`."""
        if self.precise:
            out.add_(h)
        out.addcmul_(gate, h)

    def times(self, gate: Tensor, h: Tensor, out: Tensor) -> Tensor:
        """The decayed state."""
        return torch.addcmul(h, gate, h, out=out) if self.precise else torch.mul(h, gate, out=out)


class Steps:
    """Inputs of a block during a tile.

    Args:
        u: Input, (t, b, g, d), in the dtype of the states' real part like `dt`; contiguous for `backward`.
        dt: Steps, likewise.
        B: Input maps, (t, b, g, n), in the dtype of the states like `C`.
        C: Output maps.
        keep: 0 where a sequence starts, (t, b, 1 or g, 1), or None.
    """

    def __init__(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, keep: Tensor | None) -> None:
        self.u, self.dt, self.B, self.C = u, dt, B, C
        self.weighted = (u * dt).to(B.dtype)
        self.keep = None if keep is None else keep[..., None]

    def advance(self, decay: Decay, piece: slice, place: int) -> None:
        """Decays and states of a piece, from the state at a place of the buffers."""
        count = len(self.dt[piece])
        gates, inputs = decay.held[place : place + count], decay.states[place + 1 : place + 1 + count]
        decay.gates(self.dt[piece, :, :, None], None if self.keep is None else self.keep[piece], gates)
        torch.mul(self.weighted[piece, :, :, None], self.B[piece, ..., None], out=inputs)
        for step in decay.steps[place : place + count]:
            decay.add(*step)


def piece_of(numbers: int) -> int:
    """Positions of a piece, of so many numbers each."""
    return max(1, _PIECE // numbers)


def _pieces(state: Tensor, length: int) -> list[slice]:
    size = piece_of(state.numel())
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def forward(steps: Steps, decay: Decay, h: Tensor) -> Tensor:
    """Advance the state `h`, (b, g, n, d), in place; returns the outputs, (t, b, g, d)."""
    y = h.new_empty(steps.u.shape)
    decay.states[0] = h
    for piece in _pieces(h, len(y)):
        steps.advance(decay, piece, 0)
        out = y[piece].flatten(0, 2)[:, None]
        states = decay.states[: piece.stop - piece.start + 1]
        torch.bmm(steps.C[piece].flatten(0, 2)[:, None], states[1:].flatten(0, 2), out=out)
        states[0] = states[-1]
    h.copy_(decay.states[0])
    return y.real


def backward(
    steps: Steps, decay: Decay, before: Tensor, dy: Tensor, carry: Tensor, dA: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt (t, b, g, d), B and C (t, b, g, n) in a tile.

    Args:
        steps: Inputs.
        decay: Rates.
        before: State before the tile, (b, g, n, d).
        dy: Gradient of the outputs, (t, b, g, d), in the dtype of the states.
        carry: Gradient of the state after the tile; becomes that of the state before it.
        dA: Gradient of the rates of every row, (b, g, n, d), added to.
    """
    pieces = _pieces(before, len(dy))
    decay.states[0] = before
    for piece in pieces:
        steps.advance(decay, piece, piece.start)
    states, gates = decay.states[: len(dy) + 1], decay.held[: len(dy)]
    A, B, C = (x.conj().resolve_conj() for x in (decay.A, steps.B, steps.C))
    if states.is_complex():
        states, gates = states.conj().resolve_conj(), gates.conj().resolve_conj()
    weighted, through = (torch.empty_like(dy) for _ in range(2))  # gradients of dt u, and of dt through the decay
    dB, dC = (before.new_empty(*dy.shape[:3], before.shape[2]) for _ in range(2))
    grads = torch.empty_like(gates[pieces[0]])
    each, factors = grads.unbind(0), gates.unbind(0)
    for piece in reversed(pieces):
        count, gate = piece.stop - piece.start, gates[piece]
        here = grads[:count]
        torch.mul(dy[piece, :, :, None], C[piece, ..., None], out=here)
        each[count - 1].add_(carry)
        for k in range(count - 1, 0, -1):
            decay.add(factors[piece.start + k], each[k], each[k - 1])
        flat, after = here.flatten(0, 2), states[piece.start + 1 : piece.stop + 1].flatten(0, 2)
        torch.bmm(after, dy[piece].flatten(0, 2)[..., None], out=dC[piece].flatten(0, 2)[..., None])
        torch.bmm(flat, steps.weighted[piece].flatten(0, 2)[..., None], out=dB[piece].flatten(0, 2)[..., None])
        torch.bmm(B[piece].flatten(0, 2)[:, None], flat, out=weighted[piece].flatten(0, 2)[:, None])
        decay.times(gate, here, here)
        carry.copy_(here[0])
        here.mul_(states[piece])
        torch.sum(torch.mul(here, A, out=gate), -2, out=through[piece])
        dA += here.mul_(steps.dt[piece, :, :, None]).sum(0)
    dweighted = weighted.real
    return steps.dt * dweighted, torch.addcmul(through.real, steps.u, dweighted), dB, dC
