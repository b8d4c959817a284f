"""Selective scans of the same rows from both ends on a CPU, step by step together.

A few positions at a time, a tile, have their decays, inputs and outputs formed by single operations, between which the
numbers stay in the second-level cache; the recurrence takes a position of both directions by one operation. Time is in
front, and each direction's own: the scan from the end gets its inputs turned around. For the gradient the state before
each tile is kept; formulas in `chunked.py`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .stepwise import lives_long

# Positions of a tile.
TILE = 8
# Numbers of a tile (positions x rows x directions x states x channels): a few buffers of so many fit a second-level
# cache.
NUMBERS = 1 << 17


class Inputs(NamedTuple):
    """What is scanned.

    Attributes:
        u: Input, (l, b, 2, d).
        dt: Steps, likewise.
        weighted: dt u.
        B: Input maps, (l, b, 2, n).
        C: Output maps, likewise; contiguous.
    """

    u: Tensor
    dt: Tensor
    weighted: Tensor
    B: Tensor
    C: Tensor


class InputGradients(NamedTuple):
    """Gradients of what is scanned.

    Attributes:
        weighted: Of dt u, (l, b, 2, d).
        through: Of dt through the decay, likewise.
        B: (l, b, 2, n).
        C: Likewise.
    """

    weighted: Tensor
    through: Tensor
    B: Tensor
    C: Tensor


class BothEnds:
    """Scans of so many rows, with their buffers.

    Args:
        A: Rates, (2, n, d).
        batch: Rows.
        backward: Whether gradients are asked for.
    """

    def __init__(self, A: Tensor, batch: int, backward: bool = False) -> None:
        self.A, self.batch = A, batch
        # Without a gradient tiles may be shorter: a power of two, so that the kept states are among theirs.
        most = max(1, NUMBERS // (batch * A.numel()))
        self.count = TILE if backward or most >= TILE else 1 << (most.bit_length() - 1)
        self.gates = A.new_empty(self.count, batch, *A.shape)
        self.states = A.new_empty(self.count + 1, batch, *A.shape)
        self.steps = list(zip(self.states[1:].unbind(0), self.gates.unbind(0), self.states.unbind(0)))
        if backward:
            self.grads = torch.empty_like(self.gates)
            each = self.grads.unbind(0)
            self.back = [(later, gate, grad) for (grad, later), gate in zip(itertools.pairwise(each), self.gates[1:])]
            self.ones = A.new_ones(max(self.count * batch, A.shape[1]))

    def forward(self, inputs: Inputs, saved: Tensor | None, y: Tensor) -> None:
        """Write the outputs to `y`, (l, b, 2, d), which may be `weighted`.

        The state before every eighth position goes to `saved`, (l / 8, b, 2, n, d).
        """
        precise = self._precise(inputs)
        parts = zip(self._advances(inputs), self._rows(inputs.C), self._rows(y), strict=True)
        self.states[0] = 0
        for number, (part, C, out) in enumerate(parts):
            if saved is not None and number * self.count % TILE == 0:
                saved[number * self.count // TILE] = self.states[0]
            states = self._advance(part, precise)
            torch.bmm(C, states, out=out)
            self.states[0] = self.states[len(part[0])]

    def backward(
        self, inputs: Inputs, dy: Tensor, saved: Tensor, y: Tensor, found: InputGradients, dA_log: Tensor
    ) -> None:
        """Gradients, into `found`, and outputs, into `y`.

        Args:
            inputs: What is scanned.
            dy: Gradient of the outputs, (l, b, 2, d).
            saved: State before every eighth position.
            y: (l, b, 2, d).
            found: Contiguous.
            dA_log: Gradient of log(-A), (2, n, d), added to.
        """
        precise, (_, _, weighted, B, C) = self._precise(inputs), inputs
        rows = list(zip(*(self._rows(x) for x in (y, C, dy, B, weighted, *found)), strict=True))
        outer = list(zip(dy[..., None, :].split(TILE), C[..., None].split(TILE), strict=True))
        carry = torch.zeros_like(self.states[0])
        for number, part in reversed(list(enumerate(self._advances(inputs)))):
            out, C_row, dout, B_row, w, dw, through, dB, dC = rows[number]
            self.states[0] = saved[number]
            states, count = self._advance(part, precise), len(part[0])
            gates, grads = self.gates[:count], self.grads[:count]
            torch.mul(*outer[number], out=grads)
            grads[-1].add_(carry)
            for later, gate, grad in self.back[count - 2 :: -1] if count > 1 else ():
                if precise:
                    grad.add_(later)
                grad.addcmul_(gate, later)
            if precise:
                gates.add_(1)
            torch.mul(gates[0], grads[0], out=carry)
            flat = grads.flatten(0, 2)
            torch.bmm(C_row, states, out=out)
            # Rows times matrices: matrices times columns take thrice as long.
            torch.bmm(dout, states.mT, out=dC)
            torch.bmm(w, flat.mT, out=dB)
            torch.bmm(B_row, flat, out=dw)
            products = gates.mul_(self.states[:count]).mul_(grads).mul_(self.A)
            ones = self.ones[: self.A.shape[1]].expand(len(through), 1, -1)
            torch.bmm(ones, products.flatten(0, 2), out=through)
            each = products.mul_(part[0]).flatten(0, 1).flatten(1)
            dA_log.view(-1).addmv_(each.mT, self.ones[: len(each)])

    def _precise(self, inputs: Inputs) -> bool:
        return lives_long(inputs.dt, self.A)

    def _advances(self, inputs: Inputs) -> list[tuple[Tensor, ...]]:
        """Steps, weighted inputs and input maps of each tile."""
        wide = inputs.dt[..., None, :], inputs.weighted[..., None, :], inputs.B[..., None]
        return list(zip(*(x.split(self.count) for x in wide), strict=True))

    def _rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tiles of (l, b, 2, k) as rows of one position and direction each, (t b 2, 1, k)."""
        return x.flatten(0, 2)[:, None].split(2 * self.batch * self.count)

    def _advance(self, part: tuple[Tensor, ...], precise: bool) -> Tensor:
        """Decays and states of a tile; returns these, (t b 2, n, d)."""
        dt, weighted, B = part
        gates, states = self.gates[: len(dt)], self.states[1 : 1 + len(dt)]
        torch.mul(dt, self.A, out=gates)
        gates.expm1_() if precise else gates.exp_()
        torch.mul(weighted, B, out=states)
        for state, gate, before in self.steps[: len(dt)]:
            if precise:
                state.add_(before)
            state.addcmul_(gate, before)
        return states.flatten(0, 2)
