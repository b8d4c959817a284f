"""One position after another on a CPU, where a position has numbers enough to outweigh the dispatch of an operation.

A few positions at a time, a piece, have their decays, inputs and outputs formed by single operations, between which the
numbers stay in the cache; only the recurrence itself takes positions one by one. Going backward the states of one tile
at a time are formed again from the saved one, each without its own input; see `chunked.py` for the formulas.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

# exp(dt A) near 1 is rounded by up to 2^-25, the same way at each step of equal length. Over so many positions this
# stays below 3.1e-5 of a state that keeps everything; where states live longer expm1 is taken, which needs six times as
# long.
_EXP_POSITIONS = 1024
# Numbers of a piece, (positions, rows, states, channels).
_PIECE = 1 << 18


def lives_long(dt: Tensor, A: Tensor) -> bool:
    """Whether rounding may take more of a state than it does of one that keeps everything over `_EXP_POSITIONS`.

    Stretches of half as many positions are looked at, of which k positions hold all of at least k / stretch - 2. Where
    each leaves 2 / 3 of a state or less, k times what is left after k positions never exceeds `_EXP_POSITIONS`.

    Args:
        dt: Steps, (l, b, g, d).
        A: Rates, (g, n, d).
    """
    stretch = max(1, _EXP_POSITIONS // 2)
    if dt.shape[0] <= _EXP_POSITIONS:
        return False
    whole = dt[: dt.shape[0] // stretch * stretch].to(A.real.dtype).unflatten(0, (-1, stretch))
    exponents = whole.sum(1).amin((0, 1)) * -A.real.amax(1)  # (g, d)
    return not bool((exponents >= math.log(1.5)).all())


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

    def advance(self, decay: Decay, piece: slice) -> None:
        """States of a piece, from the first one in the buffer."""
        count = len(self.dt[piece])
        gates, inputs = decay.held[:count], decay.states[1 : 1 + count]
        decay.gates(self.dt[piece, :, :, None], None if self.keep is None else self.keep[piece], gates)
        torch.mul(self.weighted[piece, :, :, None], self.B[piece, ..., None], out=inputs)
        for step in decay.steps[:count]:
            decay.add(*step)

    def decayed(self, decay: Decay, pieces: list[slice], state: Tensor) -> None:
        """Decays, and each state before its own input, of all positions, from the state `state`, which is advanced."""
        dt, gates, decayed = self.dt[:, :, :, None], decay.held.unbind(0), decay.states.unbind(0)
        inputs, maps = self.weighted[:, :, :, None].unbind(0), self.B[..., None].unbind(0)
        for piece in pieces:
            decay.gates(dt[piece], None if self.keep is None else self.keep[piece], decay.held[piece])
            for k in range(piece.start, piece.stop):
                decay.times(gates[k], state, decayed[k])
                torch.addcmul(decayed[k], inputs[k], maps[k], out=state)


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
        steps.advance(decay, piece)
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
    pieces, count = _pieces(before, len(dy)), len(dy)
    gates, decayed = decay.held[:count], decay.states[:count]
    steps.decayed(decay, pieces, before.clone())
    A, B, C = (x.conj().resolve_conj() for x in (decay.A, steps.B, steps.C))
    if gates.is_complex():
        decayed, gates = decayed.conj().resolve_conj(), gates.conj().resolve_conj()
    weighted, through = (torch.empty_like(dy) for _ in range(2))  # gradients of dt u, and of dt through the decay
    dB, dC = (before.new_empty(*dy.shape[:3], before.shape[2]) for _ in range(2))
    grads = torch.empty_like(gates[pieces[0]])
    each, factors, dt = grads.unbind(0), gates.unbind(0), steps.dt[:, :, :, None].unbind(0)
    for piece in reversed(pieces):
        start, count = piece.start, piece.stop - piece.start
        here, before_input = grads[:count], decayed[piece]
        torch.mul(dy[piece, :, :, None], C[piece, ..., None], out=here)
        each[count - 1].add_(carry)
        for k in range(count - 1, 0, -1):
            decay.add(factors[start + k], each[k], each[k - 1])
        decay.times(factors[start], each[0], carry)
        flat, held = here.flatten(0, 2), before_input.flatten(0, 2)
        # Rows times matrices: matrices times columns take thrice as long.
        torch.bmm(dy[piece].flatten(0, 2)[:, None], held.mT, out=dC[piece].flatten(0, 2)[:, None])
        torch.bmm(steps.weighted[piece].flatten(0, 2)[:, None], flat.mT, out=dB[piece].flatten(0, 2)[:, None])
        torch.bmm(B[piece].flatten(0, 2)[:, None], flat, out=weighted[piece].flatten(0, 2)[:, None])
        here.mul_(before_input)
        for k in range(count):
            dA.addcmul_(each[k], dt[start + k])
        torch.sum(here.mul_(A), -2, out=through[piece])
    dC.addcmul_((dy * steps.weighted).sum(-1, keepdim=True), B)  # of what entered the state at the position itself
    dweighted = weighted.real
    return steps.dt * dweighted, torch.addcmul(through.real, steps.u, dweighted), dB, dC
