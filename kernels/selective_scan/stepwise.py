"""One position after another on a CPU, where a position has numbers enough to outweigh the dispatch of an operation.

The state stays in the cache and is updated in place, and no state of a tile of positions is written out going forward.
Going backward the states of one tile at a time are formed again from the saved one; see `chunked.py` for the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp(dt A) near 1 is rounded by up to 2^-25, the same way at each step of equal length. Over so many positions this
# stays below 3.1e-5 of a state that keeps everything; longer rows take expm1, which needs four times as long.
_EXP_POSITIONS = 1024


class Decay:
    """Multiplies states by exp(dt A), and by 0 where a sequence starts.

    Args:
        A: Rates, (g, n, d).
        length: Positions of the whole row.
    """

    def __init__(self, A: Tensor, length: int) -> None:
        self.A = A
        self.function = torch.exp if length <= _EXP_POSITIONS else torch.expm1
        self.precise = length > _EXP_POSITIONS

    def gate(self, dt: Tensor, keep: Tensor | None, out: Tensor) -> Tensor:
        """exp(dt A), minus 1 for long rows; dt (b, g, 1, d), keep (b, g, 1, 1), out (b, g, n, d)."""
        torch.mul(dt, self.A, out=out)
        self.function(out, out=out)
        if keep is not None:
            out.masked_fill_(keep == 0, -1.0 if self.precise else 0.0)
        return out

    def times(self, gate: Tensor, h: Tensor, out: Tensor) -> Tensor:
        """The decayed state."""
        if self.precise:
            return torch.addcmul(h, gate, h, out=out)
        return torch.mul(h, gate, out=out)


class Steps:
    """Inputs of a block during a tile, position by position.

    Args:
        u: Input, (t, b, g, d), in the dtype of the states' real part like `dt`; contiguous for `backward`.
        dt: Steps, likewise.
        B: Input maps, (t, b, g, n), in the dtype of the states like `C`.
        C: Output maps.
        keep: 0 where a sequence starts, (t, b, 1 or g, 1), or None.
    """

    def __init__(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, keep: Tensor | None) -> None:
        self.u, self.steps, self.weighted = u, dt, u * dt
        self.dt = dt[..., None, :].unbind(0)
        self.input = self.weighted[..., None, :].to(B.dtype).unbind(0)
        self.B, self.C = B[..., None].unbind(0), C[..., None].unbind(0)
        self.keep = [None] * len(self.dt) if keep is None else keep[..., None].unbind(0)


def forward(steps: Steps, decay: Decay, h: Tensor) -> Tensor:
    """Advance the state `h`, (b, g, n, d), in place; returns the outputs, (t, b, g, d)."""
    gate = torch.empty_like(h)
    y = h.new_empty(steps.u.shape)
    rows = y.flatten(1, 2)[:, :, None].unbind(0)
    flat = h.flatten(0, 1)
    for k, out in enumerate(rows):
        decay.times(decay.gate(steps.dt[k], steps.keep[k], gate), h, h)
        h.addcmul_(steps.input[k], steps.B[k])
        torch.bmm(steps.C[k].flatten(0, 1).mT, flat, out=out)
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
    count = len(steps.dt)
    h, gates = (before.new_empty(count + 1, *before.shape) for _ in range(2))
    h[0] = before
    states, factors = h.unbind(0), gates.unbind(0)
    for k in range(count):
        decay.times(decay.gate(steps.dt[k], steps.keep[k], factors[k]), states[k], states[k + 1])
        states[k + 1].addcmul_(steps.input[k], steps.B[k])
    A = decay.A
    if h.is_complex():
        states, factors, A = h.conj().resolve_conj().unbind(0), gates.conj().resolve_conj().unbind(0), A.conj()
        A = A.resolve_conj()
    weighted, through = (torch.empty_like(dy) for _ in range(2))  # gradients of dt u, and of dt through the decay
    dB, dC = (before.new_empty(*dy.shape[:3], before.shape[2]) for _ in range(2))
    product, flat = torch.empty_like(before), carry.flatten(0, 1)
    inputs, outputs = (x.flatten(1, 2)[..., None].unbind(0) for x in (steps.weighted.to(before.dtype), dy))
    from_y, maps = dy[..., None, :].unbind(0), [x.conj().resolve_conj() for x in (*steps.C, *steps.B)]
    out_B, out_C = (x.flatten(1, 2)[..., None].unbind(0) for x in (dB, dC))
    out_w = weighted.flatten(1, 2)[:, :, None].unbind(0)
    for k in range(count - 1, -1, -1):
        torch.bmm(states[k + 1].flatten(0, 1), outputs[k], out=out_C[k])
        carry.addcmul_(from_y[k], maps[k])
        torch.bmm(flat, inputs[k], out=out_B[k])
        torch.bmm(maps[count + k].flatten(0, 1).mT, flat, out=out_w[k])
        decay.times(factors[k], carry, carry)
        torch.mul(carry, states[k], out=product)
        dA.addcmul_(product, steps.dt[k])
        torch.sum(product.mul_(A), -2, out=through[k])
    dweighted = weighted.real
    return steps.steps * dweighted, torch.addcmul(through.real, steps.u, dweighted), dB, dC
