"""Selective scans of the same rows from both ends on a CPU, step by step together.

A few positions at a time, a tile, have their decays, inputs and outputs formed by single operations, between which the
numbers stay in the second-level cache; the recurrence takes a position of both directions by one operation. Time is in
front, and each direction's own: the scan from the end gets its inputs turned around. For the gradient the state before
each tile is kept; formulas in `chunked.py`.
"""

from __future__ import annotations

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
        dt: Steps, (l, b, 2, d).
        weighted: Steps times inputs, likewise.
        B: Input maps, (l, b, 2, n).
        C: Output maps, likewise.
    """

    dt: Tensor
    weighted: Tensor
    B: Tensor
    C: Tensor


class InputGradients(NamedTuple):
    """Gradients of what is scanned.

    Attributes:
        weighted: Of steps times inputs, (l, b, 2, d).
        through: Of dt through the decay, likewise.
        B: (l, b, 2, n).
        C: Likewise.
    """

    weighted: Tensor
    through: Tensor
    B: Tensor
    C: Tensor


class _Tile:
    """Views of the buffers for so many positions.

    Attributes:
        gates: Decays, (t, b, 2, n, d).
        before: State before each position.
        states: State at each position; first the input alone.
        matrices: These, (t b 2, n, d).
        last: State at the last one.
        steps: State, decay and state before of each position.
    """

    def __init__(self, gates: Tensor, states: Tensor, count: int) -> None:
        self.gates, self.before, self.states = gates[:count], states[:count], states[1 : 1 + count]
        self.matrices, self.last = self.states.flatten(0, 2), states[count]
        self.steps = list(zip(*(x.unbind(0) for x in (self.states, self.gates, self.before)), strict=True))


class _GradientTile(_Tile):
    """The same with gradients of the states.

    Attributes:
        grads: Those that reach the states, (t, b, 2, n, d).
        rows: These, (t b 2, n, d).
        final: That of the last state.
        back: The gradient at each position but the first, the decay there, and the gradient before; the last one first.
        first: Decay and gradient at the first one.
        products: The decays' buffer, (t b 2, n, d).
        columns: The same, (2 n d, t b).
        each: As many ones as positions and rows.
        over_states: For each of t b 2 matrices a row of n ones.
    """

    def __init__(self, gates: Tensor, states: Tensor, grads: Tensor, count: int) -> None:
        super().__init__(gates, states, count)
        self.grads = grads[:count]
        self.rows, self.products = self.grads.flatten(0, 2), self.gates.flatten(0, 2)
        each = self.grads.unbind(0)
        self.final, self.first = each[-1], (self.gates[0], each[0])
        self.back = list(zip(each[1:], self.gates.unbind(0)[1:], each, strict=False))[::-1]
        self.columns = self.gates.flatten(0, 1).flatten(1).mT
        self.each = gates.new_ones(self.columns.shape[1])
        self.over_states = gates.new_ones(1, 1, gates.shape[3]).expand(len(self.rows), 1, -1)


class _Scan:
    """Tiles of what is in some buffers.

    Args:
        A: Rates, (2, n, d).
        inputs: Buffers of what is scanned.
        count: Positions of a tile.
    """

    def __init__(self, A: Tensor, inputs: Inputs, count: int) -> None:
        self.A, self.inputs, self.count = A, inputs, count
        length, batch = inputs.dt.shape[:2]
        self.gates = A.new_empty(self.count, batch, *A.shape)
        self.states = A.new_empty(self.count + 1, batch, *A.shape)
        self.sizes = [min(self.count, length - start) for start in range(0, length, self.count)]
        self.parts = self._wide(inputs.dt, inputs.weighted, inputs.B[..., None])

    def _wide(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Tiles of (l, b, 2, d), to be multiplied by matrices; of (l, b, 2, n, 1) as they are."""
        wide = (x if x.dim() == 5 else x[..., None, :] for x in tensors)
        return list(zip(*(x.split(self.count) for x in wide), strict=True))

    def _rows(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Tiles of (l, b, 2, k) as rows of one position and direction each, (t b 2, 1, k)."""
        count = self.gates[..., 0, 0].numel()
        return list(zip(*(x.flatten(0, 2)[:, None].split(count) for x in tensors), strict=True))

    def _advance(self, tile: _Tile, part: tuple[Tensor, ...], precise: bool) -> None:
        """Decays and states of a tile."""
        dt, weighted, B = part
        torch.mul(dt, self.A, out=tile.gates)
        tile.gates.expm1_() if precise else tile.gates.exp_()
        torch.mul(weighted, B, out=tile.states)
        for state, gate, before in tile.steps:
            if precise:
                state.add_(before)
            state.addcmul_(gate, before)


class BothEnds(_Scan):
    """Scans of what is in some buffers, again and again.

    Args:
        A: Rates, (2, n, d).
        inputs: Buffers of what is scanned.
        y: Buffer of the outputs, (l, b, 2, d); it may be `weighted`.
    """

    def __init__(self, A: Tensor, inputs: Inputs, y: Tensor) -> None:
        most = max(1, NUMBERS // (y.shape[1] * A.numel()))
        super().__init__(A, inputs, min(TILE, 1 << (most.bit_length() - 1)))
        tiles = {size: _Tile(self.gates, self.states, size) for size in set(self.sizes)}
        self.tiles = [tiles[size] for size in self.sizes]
        self.outputs = self._rows(inputs.C, y)

    def forward(self, saved: Tensor | None) -> None:
        """Scan; the state before every eighth position goes to `saved`, (l / 8, b, 2, n, d)."""
        precise = lives_long(self.inputs.dt, self.A)
        first = self.states[0].zero_()
        kept = None if saved is None else saved.unbind(0)
        for number, (tile, part, (C, out)) in enumerate(zip(self.tiles, self.parts, self.outputs, strict=True)):
            if kept is not None and number * self.count % TILE == 0:
                kept[number * self.count // TILE].copy_(first)
            self._advance(tile, part, precise)
            torch.bmm(C, tile.matrices, out=out)
            first.copy_(tile.last)


class BothGradients(_Scan):
    """Gradients of the scans of what is in some buffers.

    Args:
        A: Rates, (2, n, d).
        inputs: Buffers of what is scanned.
        dy: Buffer of the outputs' gradient, (l, b, 2, d).
        found: Buffers of the gradients, contiguous.
    """

    def __init__(self, A: Tensor, inputs: Inputs, dy: Tensor, found: InputGradients) -> None:
        super().__init__(A, inputs, TILE)
        self.outer = self._wide(dy, inputs.C[..., None])
        self.rows = self._rows(dy, inputs.weighted, inputs.B, *found)
        self.grads = torch.empty_like(self.gates)
        self.carry = torch.empty_like(self.states[0])
        tiles = {size: _GradientTile(self.gates, self.states, self.grads, size) for size in set(self.sizes)}
        self.tiles = [tiles[size] for size in self.sizes]

    def backward(self, saved: Tensor, dA_log: Tensor) -> None:
        """Find the gradients.

        Args:
            saved: State before every eighth position.
            dA_log: Gradient of log(-A), (2, n, d), added to.
        """
        precise, first, carry = lives_long(self.inputs.dt, self.A), self.states[0], self.carry.zero_()
        kept, flat_dA = saved.unbind(0), dA_log.view(-1)
        for number in reversed(range(len(self.sizes))):
            tile, part = self.tiles[number], self.parts[number]
            dout, weighted, B, dweighted, through, dB, dC = self.rows[number]
            first.copy_(kept[number])
            self._advance(tile, part, precise)
            torch.mul(*self.outer[number], out=tile.grads)
            tile.final.add_(carry)
            for later, gate, grad in tile.back:
                if precise:
                    grad.add_(later)
                grad.addcmul_(gate, later)
            if precise:
                tile.gates.add_(1)
            torch.mul(*tile.first, out=carry)
            # Rows times matrices: matrices times columns take thrice as long.
            torch.bmm(dout, tile.matrices.mT, out=dC)
            torch.bmm(weighted, tile.rows.mT, out=dB)
            torch.bmm(B, tile.rows, out=dweighted)
            tile.gates.mul_(tile.before).mul_(tile.grads).mul_(self.A)
            torch.bmm(tile.over_states, tile.products, out=through)
            tile.gates.mul_(part[0])
            flat_dA.addmv_(tile.columns, tile.each)
