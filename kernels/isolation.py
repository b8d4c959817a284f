"""What a NaN or an infinity may reach in a packed row: its own sequence, and nothing else.

Products with the zeros that stand between sequences would hand it on, since 0 times NaN is NaN. So positions with such
a number are set to zero before the scan, and the scan's outputs for their sequences to NaN after it. Gradients go the
same way back: what arrives as NaN or infinite is set to zero, and the gradients of its sequence to NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .transforms import apply

Reach = Literal["after", "before", "both"]


def isolated(
    scan: Callable[..., tuple[Tensor, ...]],
    seq_idx: Tensor,
    positions: Sequence[Tensor | None],
    *,
    decays: Sequence[Tensor] = (),
    first: Sequence[Tensor | None] = (),
    last: Sequence[Tensor | None] = (),
    shared: Sequence[Tensor | None] = (),
    reach: Reach = "after",
    ends: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """Run a scan over packed rows so that no sequence learns of a number in another one that is not finite.

    Args:
        scan: `scan(*positions, *decays, *first, *last, *shared)` -> outputs (b, l, ...), and a state (b, ...) for each
            of `ends`.
        seq_idx: Number of the sequence at each position, (b, l), not decreasing along a row.
        positions: Inputs (b, l, ...); None where one is absent, here and below.
        decays: Logarithms of decays, (b, l, ...); minus infinity forgets all and is a proper value.
        first: What enters the first sequence of a row, (b, ...).
        last: What enters the last sequence of a row, (b, ...).
        shared: Tensors that all positions share; their gradients are NaN where one of any sequence is.
        reach: Which positions of a sequence a bad one shows at: itself and those after, those before, or all.
        ends: Which position each state stands at, 0 or -1.

    Returns:
        What `scan` returns. Of a sequence with a NaN or an infinity, the outputs in reach and the states are NaN, and
        so are the gradients of all its positions.
    """
    groups = (*positions, *decays, *first, *last, *shared)
    bad = torch.zeros_like(seq_idx, dtype=torch.bool)
    for tensor in positions:
        if tensor is not None:
            bad = bad | ~_finite(tensor)
    for tensor in decays:
        bad = bad | ~_finite(tensor.masked_fill(tensor == -torch.inf, 0))
    row_edge = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    for edge, states in ((0, first), (seq_idx.shape[1] - 1, last)):
        for tensor in states:
            if tensor is not None:
                bad = bad | (~_finite(tensor, 1)[:, None] & (row_edge == edge))
    after, before = _after(bad, seq_idx), _before(bad, seq_idx)
    shown = {"after": after, "before": before, "both": after | before}[reach]

    kinds = "p" * (len(positions) + len(decays)) + "f" * len(first) + "l" * len(last) + "s" * len(shared)
    given = [place for place, tensor in enumerate(groups) if tensor is not None]
    enter, leave = (_Enter, _Leave) if torch.compiler.is_compiling() else (_EnterForward, _LeaveForward)
    marker, *clean = apply(enter, bad, seq_idx, "".join(kinds[place] for place in given), *(groups[i] for i in given))
    whole: list[Tensor | None] = [None] * len(groups)
    for place, tensor in zip(given, clean, strict=True):
        whole[place] = tensor
    y, *states = scan(*whole)
    found: tuple[Tensor, ...] = apply(leave, marker, shown, after | before, tuple(ends), y, *states)
    return found


def _finite(tensor: Tensor, kept: int = 2) -> Tensor:
    """Whether all numbers are finite, over all dimensions but the first ones; by a sum, which costs one reading."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dim() == kept:
        return tensor.isfinite()
    # Finite numbers of up to 32 bits cannot overflow a sum in float64.
    return tensor.sum(tuple(range(kept, tensor.dim())), dtype=torch.float64).isfinite()


def _after(bad: Tensor, seq_idx: Tensor) -> Tensor:
    """Whether a position of the same sequence, at or before this one, is bad; numbers of sequences do not decrease."""
    marked = torch.where(bad, seq_idx, torch.iinfo(seq_idx.dtype).min)
    return marked.cummax(1).values == seq_idx


def _before(bad: Tensor, seq_idx: Tensor) -> Tensor:
    """Whether a position of the same sequence, at or after this one, is bad."""
    marked = torch.where(bad, seq_idx, torch.iinfo(seq_idx.dtype).max)
    return marked.flip(1).cummin(1).values.flip(1) == seq_idx


def _replaced(tensor: Tensor, where: Tensor, value: float) -> Tensor:
    """The tensor with a value where a mask of its first dimensions says so."""
    return torch.where(where.view(*where.shape, *[1] * (tensor.dim() - where.dim())), value, tensor)


class _Enter(torch.autograd.Function):
    """Sets bad positions to zero, and gradients of their sequences to NaN; `marker` brings back what `_Leave` saw."""

    generate_vmap_rule = True

    @staticmethod
    def forward(bad: Tensor, seq_idx: Tensor, kinds: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        masks = {"p": bad, "f": bad[:, 0], "l": bad[:, -1]}
        # A state is only ever bad together with the position beside it.
        clean = (
            tensor.view_as(tensor) if kind == "s" else _replaced(tensor, masks[kind], 0)
            for kind, tensor in zip(kinds, tensors, strict=True)
        )
        return torch.zeros_like(bad, dtype=torch.float32), *clean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        bad, seq_idx, ctx.kinds = inputs[:3]
        ctx.save_for_backward(bad, seq_idx)

    @staticmethod
    def backward(ctx: Any, dmarker: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        bad, seq_idx = ctx.saved_tensors
        bad = bad | dmarker.isnan()
        ill = _after(bad, seq_idx) | _before(bad, seq_idx)
        masks = {"p": ill, "f": ill[:, 0], "l": ill[:, -1], "s": ill.any()}
        found = (
            _replaced(gradient, masks[kind], torch.nan) if needed else None
            for kind, gradient, needed in zip(ctx.kinds, gradients, ctx.needs_input_grad[3:], strict=True)
        )
        return None, None, None, *found


class _EnterForward(_Enter):
    """With a forward-mode derivative, which torch.compile does not trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _Enter.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        (bad,) = ctx.saved_tensors
        masks = {"p": bad, "f": bad[:, 0], "l": bad[:, -1]}
        moved = (
            tangent if tangent is None or kind == "s" else _replaced(tangent, masks[kind], 0)
            for kind, tangent in zip(ctx.kinds, tangents[3:], strict=True)
        )
        return torch.zeros_like(bad, dtype=torch.float32), *moved


class _Leave(torch.autograd.Function):
    """Sets outputs in reach of bad positions to NaN, and gradients that are not finite to zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        marker: Tensor, shown: Tensor, ill: Tensor, ends: tuple[int, ...], y: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        marked = (_replaced(state, ill[:, end], torch.nan) for end, state in zip(ends, states, strict=True))
        return _replaced(y, shown, torch.nan), *marked

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, shown, ill, ctx.ends = inputs[:4]
        ctx.save_for_backward(shown, ill)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *dstates: Tensor) -> tuple[Tensor | None, ...]:
        shown, ill = ctx.saved_tensors
        bad = shown | ~_finite(dy)
        place = torch.arange(ill.shape[1], device=ill.device)
        clean = [_replaced(dy, bad, 0)]
        for end, dstate in zip(ctx.ends, dstates, strict=True):
            wrong = ill[:, end] | ~_finite(dstate, 1)
            clean.append(_replaced(dstate, wrong, 0))
            bad = bad | (wrong[:, None] & (place == place[end]))
        return torch.where(bad, torch.nan, 0.0), None, None, None, *clean


class _LeaveForward(_Leave):
    """With a forward-mode derivative, which torch.compile does not trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _Leave.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:3])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        shown, ill = ctx.saved_tensors
        _, _, _, _, dy, *dstates = tangents
        masks = (shown, *(ill[:, end] for end in ctx.ends))
        return tuple(
            None if tangent is None else _replaced(tangent, mask, torch.nan)
            for tangent, mask in zip((dy, *dstates), masks, strict=True)
        )
