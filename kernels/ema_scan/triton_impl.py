"""The moving average in Triton: a warp owns a block of channels and walks along time, a stretch of rows at once.

    forward    m_t = p_t x_t + (1 - p_t) m_{t-1}
    backward   g_t = dm_t + (1 - p_{t+1}) g_{t+1},    dx_t = p_t g_t,    dp_t = sum_d g_t (x_t - m_{t-1})

The weight is one number per position, so a step is two operations per channel and nothing is scanned across threads:
the rows of a stretch are fetched together, and then used one after the other. Where batch and channels give too few
programs, the sequence is cut into parts: a first kernel finds (product of the decays, end state) of each part, the
second folds those of all parts before its own, in order. dp leaves each program as a sum over its channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import FirstDerivative, apply, call, fold, operator, unfold
from ..triton_utils import INTERPRETED, cdiv, last_contiguous, next_power_of_2, on_device, parts_of_length, quick


@triton.jit
def _place(length, channels, part_length, BLOCK_D: tl.constexpr):
    """Row, channel block, channels, and the positions [begin, end) of a program's part."""
    blocks = tl.cdiv(channels, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    begin = tl.program_id(1).to(tl.int64) * part_length
    end = tl.minimum(begin + part_length, length)
    return row, block, block * BLOCK_D + tl.arange(0, BLOCK_D), begin, end


@triton.jit
def _weight(p_row, seq_row, t, ok, PACKED: tl.constexpr):
    """Weight of position t, what is kept of the mean before it, and whether t goes on with the sequence of t - 1.

    A position that is not `ok` has weight 0, which changes nothing.
    """
    p = tl.load(p_row + t, mask=ok, other=0.0)
    keep = 1.0 - p
    linked = t >= 0
    if PACKED:
        inner = ok & (t > 0)
        linked = tl.load(seq_row + t, mask=inner, other=0) == tl.load(seq_row + t - 1, mask=inner, other=0)
        keep = tl.where(linked, keep, 0.0)
    return p, keep, linked


@triton.jit
def _fold(products_ptr, ends_ptr, carry, first, last, step, parts, channels, channel, channel_ok):
    """Fold the pairs of the parts first, first + step, .. before `last` into the carry; eight at a time are fetched."""
    count = (last - first) * step
    for group in range(0, count, 8):
        ends, products = (), ()
        for i in tl.static_range(8):
            ok = group + i < count
            part = first + (group + i) * step
            products = products + (tl.load(products_ptr + part, mask=ok, other=1.0),)
            ends = ends + (tl.load(ends_ptr + part * channels + channel, mask=channel_ok & ok, other=0.0),)
        for i in tl.static_range(8):
            carry = products[i] * carry + ends[i]
    return carry


@quick
@triton.jit(do_not_specialize=["length", "part_length"])
def _ema_scan_part_kernel(
    x_ptr,
    p_ptr,
    seq_ptr,
    products_ptr,
    ends_ptr,
    length,
    channels,
    part_length,
    x_stride_b,
    x_stride_t,
    BACKWARD: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Product of decays and end state from zero of one part; BACKWARD: of the gradient that leaves it at its start."""
    row, block, channel, begin, end = _place(length, channels, part_length, BLOCK_D)
    channel_ok = channel < channels
    p_row, seq_row = p_ptr + row * length, seq_ptr + row * length
    x_row = x_ptr + row * x_stride_b + channel
    carry = tl.zeros([BLOCK_D], ACC)
    product = tl.full([], 1.0, ACC)
    for start in range(0, end - begin, BLOCK_T):
        xs, weights = (), ()
        for i in tl.static_range(BLOCK_T):
            ok = start + i < end - begin
            t = end - 1 - start - i if BACKWARD else begin + start + i
            xs = xs + (tl.load(x_row + t * x_stride_t, mask=channel_ok & ok, other=0.0),)
            weights = weights + (_weight(p_row, seq_row, t, ok, PACKED),)
        for i in tl.static_range(BLOCK_T):
            p, keep, linked = weights[i]
            if BACKWARD:
                carry = keep * (carry + xs[i].to(ACC))
            else:
                if PACKED:
                    carry = tl.where(linked, carry, 0.0)
                carry = p * xs[i].to(ACC) + (1.0 - p) * carry
            product = product * keep
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(ends_ptr + place * channels + channel, carry, mask=channel_ok)
    if block == 0:
        tl.store(products_ptr + place, product)


@quick
@triton.jit(do_not_specialize=["length", "part_length"])
def _ema_scan_fwd_kernel(
    x_ptr,
    p_ptr,
    seq_ptr,
    initial_ptr,
    products_ptr,
    ends_ptr,
    means_ptr,
    final_ptr,
    length,
    channels,
    part_length,
    x_stride_b,
    x_stride_t,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, _block, channel, begin, end = _place(length, channels, part_length, BLOCK_D)
    channel_ok = channel < channels
    p_row, seq_row = p_ptr + row * length, seq_ptr + row * length
    x_row = x_ptr + row * x_stride_b + channel
    means_row = means_ptr + row * length * channels + channel
    parts = tl.num_programs(1)
    m = tl.zeros([BLOCK_D], ACC)
    if HAS_INITIAL:
        m = tl.load(initial_ptr + row * channels + channel, mask=channel_ok, other=0.0)
    first = row * parts
    m = _fold(products_ptr, ends_ptr, m, first, first + tl.program_id(1), 1, parts, channels, channel, channel_ok)
    for start in range(begin, end, BLOCK_T):
        xs, weights = (), ()
        for i in tl.static_range(BLOCK_T):
            ok = start + i < end
            xs = xs + (tl.load(x_row + (start + i) * x_stride_t, mask=channel_ok & ok, other=0.0),)
            weights = weights + (_weight(p_row, seq_row, start + i, ok, PACKED),)
        for i in tl.static_range(BLOCK_T):
            ok = start + i < end
            p, _, linked = weights[i]
            if PACKED:
                m = tl.where(linked, m, 0.0)
            m = p * xs[i].to(ACC) + (1.0 - p) * m
            tl.store(means_row + (start + i) * channels, m, mask=channel_ok & ok)
    if tl.program_id(1) == parts - 1:
        tl.store(final_ptr + row * channels + channel, m, mask=channel_ok)


@quick
@triton.jit(do_not_specialize=["length", "part_length"])
def _ema_scan_bwd_kernel(
    x_ptr,
    p_ptr,
    seq_ptr,
    initial_ptr,
    means_ptr,
    dmeans_ptr,
    dfinal_ptr,
    products_ptr,
    ends_ptr,
    dx_ptr,
    dp_ptr,
    dinitial_ptr,
    length,
    channels,
    part_length,
    x_stride_b,
    x_stride_t,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, block, channel, begin, end = _place(length, channels, part_length, BLOCK_D)
    channel_ok = channel < channels
    p_row, seq_row = p_ptr + row * length, seq_ptr + row * length
    x_row = x_ptr + row * x_stride_b + channel
    at_row = row * length * channels + channel  # means and gradients
    dp_row = dp_ptr + (row * tl.cdiv(channels, BLOCK_D) + block) * length
    initial = tl.zeros([BLOCK_D], ACC)
    if HAS_INITIAL:
        initial = tl.load(initial_ptr + row * channels + channel, mask=channel_ok, other=0.0)
    carry = tl.zeros([BLOCK_D], ACC)
    if HAS_FINAL:
        carry = tl.load(dfinal_ptr + row * channels + channel, mask=channel_ok, other=0.0).to(ACC)
    parts = tl.num_programs(1)
    last = row * parts + parts - 1
    carry = _fold(
        products_ptr, ends_ptr, carry, last, row * parts + tl.program_id(1), -1, parts, channels, channel, channel_ok
    )
    for start in range(0, end - begin, BLOCK_T):
        xs, means, gradients, weights = (), (), (), ()
        for i in tl.static_range(BLOCK_T):
            t = end - 1 - start - i
            ok = channel_ok & (t >= begin)
            xs = xs + (tl.load(x_row + t * x_stride_t, mask=ok, other=0.0),)
            before = means_ptr + at_row + (t - 1) * channels
            means = means + (tl.load(before, mask=ok & (t > 0), other=0.0),)
            gradients = gradients + (tl.load(dmeans_ptr + at_row + t * channels, mask=ok, other=0.0),)
            weights = weights + (_weight(p_row, seq_row, t, t >= begin, PACKED),)
        for i in tl.static_range(BLOCK_T):
            t = end - 1 - start - i
            ok = t >= begin
            p, keep, linked = weights[i]
            g = gradients[i].to(ACC) + carry
            m = tl.where(t > 0, means[i].to(ACC), initial)
            if PACKED:
                m = tl.where(linked, m, 0.0)
            tl.store(dx_ptr + at_row + t * channels, p * g, mask=channel_ok & ok)
            dp = tl.sum(tl.where(channel_ok, g * (xs[i].to(ACC) - m), 0.0), axis=0)
            tl.store(dp_row + t, dp, mask=ok)
            carry = keep * g
    if HAS_INITIAL and tl.program_id(1) == 0:
        tl.store(dinitial_ptr + row * channels + channel, carry, mask=channel_ok)


def ema_scan_triton(x: Tensor, p: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `ema_scan`; p and the state have the dtype of the sums."""
    return apply(_Ema, x, p, state, seq_idx)


@operator("ema_scan_triton_fwd")
@replayed
def _forward(x: Tensor, p: Tensor, state: Tensor | None, seq_idx: Tensor | None, parts: int) -> tuple[Tensor, Tensor]:
    """`parts` is the number of parts to cut the sequence into, 0 to choose."""
    x, p = last_contiguous(x), p.contiguous()
    state, seq_idx = (None if one is None else one.contiguous() for one in (state, seq_idx))
    _, length, channels = x.shape
    means, final = x.new_empty(x.shape), p.new_empty(x.shape[0], channels)
    grid, part_length, tile = _grid(x, parts, False)
    with on_device(x):
        pairs = _part_ends(x, p, seq_idx, False, grid, part_length, tile)
        _ema_scan_fwd_kernel[grid](
            x, p, _or(seq_idx, p), _or(state, p), *pairs, means, final, length, channels, part_length,
            x.stride(0), x.stride(1),
            HAS_INITIAL=state is not None, PACKED=seq_idx is not None, ACC=_acc(p.dtype), **tile,
        )  # fmt: skip
    return means, final


@torch.library.register_fake("ssm::ema_scan_triton_fwd")
def _(x: Tensor, p: Tensor, state: Tensor | None, seq_idx: Tensor | None, parts: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), p.new_empty(x.shape[0], x.shape[2])


@operator("ema_scan_triton_bwd")
@replayed
def _backward(
    x: Tensor,
    p: Tensor,
    state: Tensor | None,
    seq_idx: Tensor | None,
    means: Tensor,
    dmeans: Tensor,
    dfinal: Tensor | None,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, p and the state, which has no rows if it is None."""
    x, p, means, dmeans = last_contiguous(x), p.contiguous(), means.contiguous(), dmeans.contiguous()
    state, seq_idx, dfinal = (None if one is None else one.contiguous() for one in (state, seq_idx, dfinal))
    batch, length, channels = x.shape
    grid, part_length, tile = _grid(x, parts, True)
    dx, dinitial = x.new_empty(x.shape), p.new_empty(0 if state is None else batch, channels)
    dp = p.new_empty(batch, grid[0] // batch, length)
    with on_device(x):
        pairs = _part_ends(dmeans, p, seq_idx, True, grid, part_length, tile)
        _ema_scan_bwd_kernel[grid](
            x, p, _or(seq_idx, p), _or(state, p), means, dmeans, _or(dfinal, p), *pairs, dx, dp, dinitial,
            length, channels, part_length, x.stride(0), x.stride(1),
            HAS_INITIAL=state is not None, HAS_FINAL=dfinal is not None,
            PACKED=seq_idx is not None, ACC=_acc(p.dtype), **tile,
        )  # fmt: skip
    return dx, dp.view(batch, length) if dp.shape[1] == 1 else dp.sum(1), dinitial


@torch.library.register_fake("ssm::ema_scan_triton_bwd")
def _(
    x: Tensor,
    p: Tensor,
    state: Tensor | None,
    seq_idx: Tensor | None,
    means: Tensor,
    dmeans: Tensor,
    dfinal: Tensor | None,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dstate = p.new_empty(0 if state is None else x.shape[0], x.shape[2])
    return x.new_empty(x.shape), p.new_empty(p.shape), dstate


class _Ema(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, p: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        return call(_forward, x, p, state, seq_idx, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dmeans: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dmeans = torch.zeros_like(saved[4]) if dmeans is None else dmeans
        dx, dp, dstate = apply(_EmaGradient, *saved, dmeans, dfinal)
        return dx, dp, None if saved[2] is None else dstate, None


class _EmaGradient(FirstDerivative):
    name = "ema_scan"

    @staticmethod
    def forward(
        x: Tensor,
        p: Tensor,
        state: Tensor | None,
        seq_idx: Tensor | None,
        means: Tensor,
        dmeans: Tensor,
        dfinal: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return call(_backward, x, p, state, seq_idx, means, dmeans, dfinal, 0)


@torch.library.register_vmap("ssm::ema_scan_triton_fwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    *tensors, parts = arguments
    folded = [fold(tensor, mapped, info.batch_size) for tensor, mapped in zip(tensors, in_dims)]
    return tuple(unfold(output, info.batch_size) for output in _forward(*folded, parts)), (0, 0)


@torch.library.register_vmap("ssm::ema_scan_triton_bwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    *tensors, parts = arguments
    folded = [fold(tensor, mapped, info.batch_size) for tensor, mapped in zip(tensors, in_dims)]
    return tuple(unfold(output, info.batch_size) for output in _backward(*folded, parts)), (0, 0, 0)


def _acc(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor to pass in the place of an absent one, which is not read."""
    return other if tensor is None else tensor


def _tile(channels: int, element_size: int, backward: bool) -> dict[str, int]:
    """Rows that are fetched together, and channels: a warp reads 16 bytes a thread."""
    block_d = min(next_power_of_2(channels), 512 // element_size)
    if INTERPRETED:
        return {"BLOCK_T": 4, "BLOCK_D": block_d}
    return {"BLOCK_T": 8 if backward else 16, "BLOCK_D": block_d, "num_warps": 1}


def _grid(x: Tensor, parts: int, backward: bool) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid (rows x channel blocks, parts), positions of a part, and the tile."""
    batch, length, channels = x.shape
    tile = _tile(channels, x.element_size(), backward)
    programs = cdiv(channels, tile["BLOCK_D"]) * batch
    parts = parts or parts_of_length(programs, length, x.device, 64)
    part_length = cdiv(length, parts)
    return (programs, cdiv(length, part_length)), part_length, tile


def _part_ends(
    x: Tensor,
    p: Tensor,
    seq_idx: Tensor | None,
    backward: bool,
    grid: tuple[int, int],
    part_length: int,
    tile: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Product of decays (b, parts) and end state from zero (b, parts, d) of every part; a single one needs none."""
    batch, length, channels = x.shape
    if grid[1] == 1:
        return p, p  # not read
    products, ends = p.new_empty(batch, grid[1]), p.new_empty(batch, grid[1], channels)
    _ema_scan_part_kernel[grid](
        x, p, _or(seq_idx, p), products, ends, length, channels, part_length, x.stride(0), x.stride(1),
        BACKWARD=backward, PACKED=seq_idx is not None, ACC=_acc(p.dtype), **tile,
    )  # fmt: skip
    return products, ends
