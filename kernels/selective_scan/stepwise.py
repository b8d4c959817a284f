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
    """Multiplies states by exp(dt A), and by 0 where a sequence starts.

    Args:
        A: Rates, (g, n, d).
        precise: Whether decays are held as expm1(dt A).
    """

    def __init__(self, A: Tensor, precise: bool) -> None:
        self.A, self.precise = A, precise
        self.function = torch.expm1 if precise else torch.exp

    def gates(self, dt: Tensor, keep: Tensor | None, out: Tensor) -> None:
        """exp(dt A), minus 1 if precise; dt (t, b, g, 1, d), keep (t, b, g, 1, 1), out (t, b, g, n, d)."""
        torch.mul(dt, self.A, out=out)
        self.function(out, out=out)
        if keep is not None:
            out.masked_fill_(keep == 0, -1.0 if self.precise else 0.0)

    def add(self, gate: Tensor, h: Tensor, out: Tensor) -> None:
        """Add the decayed state."""
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

    def pieces(self, state: Tensor) -> list[slice]:
        """Positions that are done together, for states like this one."""
        size = max(1, _PIECE // state.numel())
        return [slice(start, start + size) for start in range(0, len(self.dt), size)]


def _advance(steps: Steps, decay: Decay, piece: slice, gates: Tensor, states: Tensor) -> None:
    """From states[0] to the decays and the states of all positions of a piece."""
    decay.gates(steps.dt[piece, :, :, None], None if steps.keep is None else steps.keep[piece], gates)
    torch.mul(steps.weighted[piece, :, :, None], steps.B[piece, ..., None], out=states[1:])
    for gate, (before, after) in zip(gates.unbind(0), itertools.pairwise(states.unbind(0))):
        decay.add(gate, before, after)


def forward(steps: Steps, decay: Decay, h: Tensor) -> Tensor:
    """Advance the state `h`, (b, g, n, d), in place; returns the outputs, (t, b, g, d)."""
    y, pieces = h.new_empty(steps.u.shape), steps.pieces(h)
    length = min(pieces[0].stop, len(y))
    states, gates = h.new_empty(length + 1, *h.shape), h.new_empty(length, *h.shape)
    states[0] = h
    for piece in pieces:
        out = y[piece].flatten(0, 2)[:, None]
        here = states[: y[piece].shape[0] + 1]
        _advance(steps, decay, piece, gates[: len(here) - 1], here)
        torch.bmm(steps.C[piece].flatten(0, 2)[:, None], here[1:].flatten(0, 2), out=out)
        states[0] = here[-1]
    h.copy_(states[0])
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
    pieces = steps.pieces(before)
    states, gates = before.new_empty(len(dy) + 1, *before.shape), before.new_empty(len(dy), *before.shape)
    states[0] = before
    for piece in pieces:
        _advance(steps, decay, piece, gates[piece], states[piece.start : piece.stop + 1])
    A, B, C = (x.conj().resolve_conj() for x in (decay.A, steps.B, steps.C))
    if states.is_complex():
        states, gates = states.conj().resolve_conj(), gates.conj().resolve_conj()
    weighted, through = (torch.empty_like(dy) for _ in range(2))  # gradients of dt u, and of dt through the decay
    dB, dC = (before.new_empty(*dy.shape[:3], before.shape[2]) for _ in range(2))
    grads = torch.empty_like(gates[pieces[0]])
    for piece in reversed(pieces):
        here, gate = grads[: len(gates[piece])], gates[piece]
        torch.mul(dy[piece, :, :, None], C[piece, ..., None], out=here)
        here[-1] += carry
        for k in range(len(here) - 1, 0, -1):
            decay.add(gate[k], here[k], here[k - 1])
        flat, after = here.flatten(0, 2), states[piece.start + 1 : piece.stop + 1].flatten(0, 2)
        torch.bmm(after, dy[piece].flatten(0, 2)[..., None], out=dC[piece].flatten(0, 2)[..., None])
        torch.bmm(flat, steps.weighted[piece].flatten(0, 2)[..., None], out=dB[piece].flatten(0, 2)[..., None])
        torch.bmm(B[piece].flatten(0, 2)[:, None], flat, out=weighted[piece].flatten(0, 2)[:, None])
        decay.times(gate, here, here)
        carry.copy_(here[0])
        here.mul_(states[piece.start : piece.start + len(here)])
        torch.sum(torch.mul(here, A, out=gate), -2, out=through[piece])
        dA += here.mul_(steps.dt[piece, :, :, None]).sum(0)
    dweighted = weighted.real
    return steps.dt * dweighted, torch.addcmul(through.real, steps.u, dweighted), dB, dC
