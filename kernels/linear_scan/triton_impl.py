"""The recurrence in Triton: tiles of [time, channels], an associative scan along time, a serial carry over tiles.

    forward    h_t = a_t h_{t-1} + b_t
    backward   g_t = dh_t + a_{t+1} g_{t+1},    db_t = g_t,    da_t = g_t h_{t-1},    dh0 = a_0 g_0

Kernels count steps, not positions: step s is position s, or l-1-s when the scan runs in reverse, so that the backward
pass is the same loop in the other direction and no tile is ever flipped. Where batch and channels give too few
programs, the sequence is cut into parts: a first kernel finds (product of a, end state) of each part, the second one
folds the pairs of all earlier parts, in order, and scans. Sums over programs go through a buffer: no atomics.
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
def _compose(a_left, b_left, a_right, b_right):
    return a_left * a_right, a_right * b_left + b_right


@triton.jit
def _last_row(x, BLOCK_T: tl.constexpr):
    rows = tl.arange(0, BLOCK_T)[:, None]
    return tl.sum(tl.where(rows == BLOCK_T - 1, x, 0.0), axis=0)


@triton.jit
def _carry_into_part(products_ptr, ends_ptr, carry, part, first, parts_stride, channel_ok, ACC: tl.constexpr):
    """Fold the (product, end state) pairs of parts 0 .. part-1 into the state that enters `part`."""
    for earlier in range(part):
        offset = first + earlier * parts_stride
        product = tl.load(products_ptr + offset, mask=channel_ok, other=0.0).to(ACC)
        end = tl.load(ends_ptr + offset, mask=channel_ok, other=0.0).to(ACC)
        carry = product * carry + end
    return carry


@quick
@triton.jit(do_not_specialize=["length", "part_length"])
def _linear_scan_part_kernel(
    a_ptr,
    b_ptr,
    products_ptr,
    ends_ptr,
    length,
    channels,
    part_length,
    a_stride_b,
    a_stride_t,
    a_stride_d,
    b_stride_b,
    b_stride_t,
    REVERSE: tl.constexpr,
    SHIFT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Product of decays and end state from zero of one part. With SHIFT step s takes the decay of step s-1 (1 at 0)."""
    blocks = tl.cdiv(channels, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    channel_ok = channel < channels
    begin = part * part_length
    end = tl.minimum(begin + part_length, length)
    steps = tl.arange(0, BLOCK_T)[:, None]
    ahead = -steps if REVERSE else steps  # [BLOCK_T, 1] positions from the first one of a tile
    a_offset = ahead * a_stride_t + channel[None, :] * a_stride_d
    b_offset = ahead * b_stride_t + channel[None, :]
    shift = 0
    if SHIFT:
        shift = 1 if REVERSE else -1
    product = tl.full([BLOCK_D], 1.0, ACC)
    carry = tl.zeros([BLOCK_D], ACC)
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        ok = (steps < end - start) & channel_ok[None, :]
        a_ok = ok
        if SHIFT:
            a_ok = ok & (steps > -start)
        position = length - 1 - start if REVERSE else start
        a_tile = a_ptr + row * a_stride_b + (position + shift) * a_stride_t
        a = tl.load(a_tile + a_offset, mask=a_ok, other=1.0).to(ACC)
        b_tile = b_ptr + row * b_stride_b + position * b_stride_t
        b = tl.load(b_tile + b_offset, mask=ok, other=0.0).to(ACC)
        a, b = tl.associative_scan((a, b), 0, _compose)
        last_a = _last_row(a, BLOCK_T)
        carry = last_a * carry + _last_row(b, BLOCK_T)
        product = product * last_a
    out = (row * tl.num_programs(1) + part) * channels + channel
    tl.store(products_ptr + out, product, mask=channel_ok)
    tl.store(ends_ptr + out, carry, mask=channel_ok)


@quick
@triton.jit(do_not_specialize=["length", "part_length"])
def _linear_scan_fwd_kernel(
    a_ptr,
    b_ptr,
    initial_ptr,
    products_ptr,
    ends_ptr,
    states_ptr,
    final_ptr,
    length,
    channels,
    part_length,
    a_stride_b,
    a_stride_t,
    a_stride_d,
    b_stride_b,
    b_stride_t,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(1)
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    channel_ok = channel < channels
    begin = part * part_length
    end = tl.minimum(begin + part_length, length)
    steps = tl.arange(0, BLOCK_T)[:, None]
    ahead = -steps if REVERSE else steps  # [BLOCK_T, 1] positions from the first one of a tile
    a_offset = ahead * a_stride_t + channel[None, :] * a_stride_d
    b_offset = ahead * b_stride_t + channel[None, :]
    h_offset = ahead * channels + channel[None, :]
    carry = tl.zeros([BLOCK_D], ACC)
    if HAS_INITIAL:
        carry = tl.load(initial_ptr + row * channels + channel, mask=channel_ok, other=0.0).to(ACC)
    carry = _carry_into_part(
        products_ptr, ends_ptr, carry, part, row * parts * channels + channel, channels, channel_ok, ACC
    )
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        ok = (steps < end - start) & channel_ok[None, :]
        position = length - 1 - start if REVERSE else start
        a_tile = a_ptr + row * a_stride_b + position * a_stride_t
        a = tl.load(a_tile + a_offset, mask=ok, other=1.0).to(ACC)
        b_tile = b_ptr + row * b_stride_b + position * b_stride_t
        b = tl.load(b_tile + b_offset, mask=ok, other=0.0).to(ACC)
        a, b = tl.associative_scan((a, b), 0, _compose)
        h = a * carry[None, :] + b  # [BLOCK_T, BLOCK_D]; steps behind the end repeat the last state
        tl.store(states_ptr + (row * length + position) * channels + h_offset, h, mask=ok)
        carry = _last_row(h, BLOCK_T)
    if part == parts - 1:
        tl.store(final_ptr + row * channels + channel, carry, mask=channel_ok)


@quick
@triton.jit(do_not_specialize=["length", "part_length"])
def _linear_scan_bwd_kernel(
    a_ptr,
    states_ptr,
    initial_ptr,
    dstates_ptr,
    dfinal_ptr,
    products_ptr,
    ends_ptr,
    da_ptr,
    db_ptr,
    dinitial_ptr,
    length,
    channels,
    part_length,
    a_stride_b,
    a_stride_t,
    a_stride_d,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Steps count in the direction of the gradient; REVERSE is that direction."""
    blocks = tl.cdiv(channels, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    part = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(1)
    channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
    channel_ok = channel < channels
    begin = part * part_length
    end = tl.minimum(begin + part_length, length)
    steps = tl.arange(0, BLOCK_T)[:, None]
    ahead = -steps if REVERSE else steps  # [BLOCK_T, 1] positions from the first one of a tile
    forward = -1 if REVERSE else 1  # one step in this direction
    a_offset = ahead * a_stride_t + channel[None, :] * a_stride_d
    h_offset = ahead * channels + channel[None, :]
    of_row = row * channels + channel
    carry = tl.load(dfinal_ptr + of_row, mask=channel_ok, other=0.0).to(ACC)
    carry = _carry_into_part(
        products_ptr, ends_ptr, carry, part, row * parts * channels + channel, channels, channel_ok, ACC
    )
    initial = tl.zeros([BLOCK_D], ACC)
    if HAS_INITIAL:
        initial = tl.load(initial_ptr + of_row, mask=channel_ok, other=0.0).to(ACC)
    da_sum = tl.zeros([BLOCK_D], ACC)
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        ok = (steps < end - start) & channel_ok[None, :]
        position = length - 1 - start if REVERSE else start
        a_tile = a_ptr + row * a_stride_b + (position - forward) * a_stride_t  # decay of the step before
        a = tl.load(a_tile + a_offset, mask=ok & (steps > -start), other=1.0).to(ACC)
        tile = (row * length + position) * channels
        g = tl.load(dstates_ptr + tile + h_offset, mask=ok, other=0.0).to(ACC)
        inner = steps < length - 1 - start  # the last step's state came from the initial one
        came_from = states_ptr + tile + forward * channels
        h = tl.load(came_from + h_offset, mask=ok & inner, other=0.0).to(ACC)
        if HAS_INITIAL:
            h = tl.where(inner, h, initial[None, :])
        a, g = tl.associative_scan((a, g), 0, _compose)
        g = a * carry[None, :] + g
        tl.store(db_ptr + tile + h_offset, g, mask=ok)
        da = g * h
        if DECAY == "full":
            tl.store(da_ptr + tile + h_offset, da, mask=ok)
        elif DECAY == "position":
            out = da_ptr + (row * blocks + block) * length + position
            tl.store(out + ahead, tl.sum(tl.where(ok, da, 0.0), axis=1)[:, None], mask=steps < end - start)
        else:
            da_sum += tl.sum(tl.where(ok, da, 0.0), axis=0)
        carry = _last_row(g, BLOCK_T)
    if DECAY == "channel":
        tl.store(da_ptr + (row * parts + part) * channels + channel, da_sum, mask=channel_ok)
    if part == parts - 1:
        first_decay = a_ptr + row * a_stride_b + channel * a_stride_d
        if not REVERSE:
            first_decay += (end - 1) * a_stride_t  # `end` is an int64
        a_first = tl.load(first_decay, mask=channel_ok, other=0.0).to(ACC)
        tl.store(dinitial_ptr + of_row, a_first * carry, mask=channel_ok)


def linear_scan_triton(
    a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `linear_scan`; a is (b, l, d), (b, l, 1) or (1, 1, d), b (b, l, d)."""
    if initial_state is not None:
        initial_state = initial_state.to(state_dtype)
    return apply(_Scan, a, b, initial_state, reverse)


@operator("linear_scan_triton_fwd")
@replayed
def _forward(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool, parts: int) -> tuple[Tensor, Tensor]:
    """`parts` is the number of parts to cut the sequence into, 0 to choose."""
    a, b = last_contiguous(a), last_contiguous(b)
    _, length, channels = b.shape
    states, final = _empty_outputs(b)
    initial = None if initial_state is None else initial_state.contiguous()
    grid, part_length, tile = _grid(b, parts, False)
    strides = _broadcast_strides(a, b)
    with on_device(b):
        products, ends = _part_ends(a, b, strides, reverse, False, grid, part_length, tile, final.dtype)
        _linear_scan_fwd_kernel[grid](
            a, b, initial, products, ends, states, final, length, channels, part_length,
            *strides, b.stride(0), b.stride(1),
            REVERSE=reverse, HAS_INITIAL=initial is not None, ACC=_acc(final.dtype), **tile,
        )  # fmt: skip
    return states, final


@torch.library.register_fake("ssm::linear_scan_triton_fwd")
def _(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool, parts: int) -> tuple[Tensor, Tensor]:
    return _empty_outputs(b)


@operator("linear_scan_triton_bwd")
@replayed
def _backward(
    a: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    dstates: Tensor,
    dfinal: Tensor,
    reverse: bool,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the initial state (returned in any case); `reverse` as in the forward pass."""
    a, states, dstates, dfinal = last_contiguous(a), states.contiguous(), dstates.contiguous(), dfinal.contiguous()
    batch, length, channels = states.shape
    initial = None if initial_state is None else initial_state.contiguous()
    grid, part_length, tile = _grid(states, parts, True)
    strides = _broadcast_strides(a, states)
    db, dinitial = torch.empty_like(states), torch.empty_like(dfinal)
    decay = "full" if a.shape == states.shape else "channel" if a.shape[2] == channels else "position"
    per_block, per_part = (batch, grid[0] // batch, length), (1, batch * grid[1], channels)
    buffer = {"full": states.shape, "position": per_block, "channel": per_part}[decay]
    da = states.new_empty(buffer, dtype=a.dtype if decay == "full" else dfinal.dtype)
    with on_device(states):
        products, ends = _part_ends(a, dstates, strides, not reverse, True, grid, part_length, tile, dfinal.dtype)
        _linear_scan_bwd_kernel[grid](
            a, states, initial, dstates, dfinal, products, ends, da, db, dinitial, length, channels, part_length,
            *strides, REVERSE=not reverse, HAS_INITIAL=initial is not None, DECAY=decay, ACC=_acc(dfinal.dtype),
            **tile,
        )  # fmt: skip
    if decay != "full":
        da = da.sum(1).to(a.dtype).view(a.shape)
    return da, db, dinitial


@torch.library.register_fake("ssm::linear_scan_triton_bwd")
def _(
    a: Tensor, states: Tensor, initial_state: Tensor | None, dstates: Tensor, dfinal: Tensor, reverse: bool, parts: int
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), states.new_empty(states.shape), dfinal.new_empty(dfinal.shape)


class _Scan(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        return call(_forward, a, b, initial_state, reverse, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, _, initial_state, ctx.reverse = inputs
        ctx.save_for_backward(a, output[0], initial_state)

    @staticmethod
    def backward(ctx: Any, dstates: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        a, states, initial_state = ctx.saved_tensors
        da, db, dinitial = apply(_ScanGradient, a, states, initial_state, dstates, dfinal, ctx.reverse)
        return da, db, None if initial_state is None else dinitial, None


class _ScanGradient(FirstDerivative):
    name = "linear_scan"

    @staticmethod
    def forward(
        a: Tensor, states: Tensor, initial_state: Tensor | None, dstates: Tensor, dfinal: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return call(_backward, a, states, initial_state, dstates, dfinal, reverse, 0)


def _fold_decay(a: Tensor, mapped: int | None, count: int, batch: int, length: int) -> Tensor:
    """Fold a mapped `a`; one that is shared by rows (1, 1, d) must first be written out for them."""
    if mapped is None:
        return a if a.shape[:2] == (1, 1) else fold(a, None, count)  # type: ignore[return-value]
    return fold(a.movedim(mapped, 0).expand(count, batch, length, -1), 0, count)  # type: ignore[return-value]


@torch.library.register_vmap("ssm::linear_scan_triton_fwd")
def _(
    info: Any, in_dims: tuple[Any, ...], a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool, parts: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    count = info.batch_size
    batch, length, _ = b.shape if in_dims[1] is None else b.select(in_dims[1], 0).shape
    states, final = _forward(
        _fold_decay(a, in_dims[0], count, batch, length),
        fold(b, in_dims[1], count),
        fold(initial_state, in_dims[2], count),
        reverse,
        parts,
    )
    return (unfold(states, count), unfold(final, count)), (0, 0)


@torch.library.register_vmap("ssm::linear_scan_triton_bwd")
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    a: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    dstates: Tensor,
    dfinal: Tensor,
    reverse: bool,
    parts: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    count = info.batch_size
    batch, length, _ = states.shape if in_dims[1] is None else states.select(in_dims[1], 0).shape
    shape = a.shape if in_dims[0] is None else a.select(in_dims[0], 0).shape
    # Each mapped instance has its own gradient of `a`, also where all share one `a`.
    wide = a.expand(count, *shape) if in_dims[0] is None else a.movedim(in_dims[0], 0)
    da, db, dinitial = _backward(
        wide.expand(count, batch, length, shape[-1]).flatten(0, 1),
        fold(states, in_dims[1], count),
        fold(initial_state, in_dims[2], count),
        fold(dstates, in_dims[3], count),
        fold(dfinal, in_dims[4], count),
        reverse,
        parts,
    )
    da = unfold(da, count).sum_to_size(count, *shape)
    return (da, unfold(db, count), unfold(dinitial, count)), (0, 0, 0)


def _empty_outputs(b: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, channels = b.shape
    return b.new_empty(b.shape), b.new_empty(batch, channels, dtype=torch.promote_types(b.dtype, torch.float32))


def _acc(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _broadcast_strides(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Strides of `a` when it is read with the shape of `b`: 0 along dimensions that broadcast."""
    return tuple(0 if size == 1 != wide else stride for size, wide, stride in zip(a.shape, b.shape, a.stride()))


def _tile(length: int, channels: int, element_size: int, backward: bool) -> dict[str, int]:
    """Tile of time and channels.

    One warp a program: its scan needs shuffles only, and three tiles on their way hide the loads. On an H100 this is
    3 to 15% faster than four warps.
    """
    if INTERPRETED:
        block_t, block_d = next_power_of_2(min(length, 64)), next_power_of_2(min(channels, 128))
        return {"BLOCK_T": block_t, "BLOCK_D": block_d, "STAGES": 1}
    block_t = 16 if backward and element_size >= 4 else 32
    block_d = 32 if backward or element_size >= 4 else 16
    return {"BLOCK_T": block_t, "BLOCK_D": next_power_of_2(min(channels, block_d)), "STAGES": 3, "num_warps": 1}


def _grid(b: Tensor, parts: int, backward: bool) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid (rows x channel blocks, parts), steps of a part, and the tile."""
    batch, length, channels = b.shape
    tile = _tile(length, channels, b.element_size(), backward)
    programs = cdiv(channels, tile["BLOCK_D"]) * batch
    parts = parts or parts_of_length(programs, length, b.device, 8 * tile["BLOCK_T"])
    part_length = cdiv(cdiv(length, parts), tile["BLOCK_T"]) * tile["BLOCK_T"]
    return (programs, cdiv(length, part_length)), part_length, tile


def _part_ends(
    a: Tensor,
    b: Tensor,
    strides: tuple[int, ...],
    reverse: bool,
    shift: bool,
    grid: tuple[int, int],
    part_length: int,
    tile: dict[str, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Product of decays and end state from zero of every part, (b, parts, d) each; not computed for a single part."""
    batch, length, channels = b.shape
    if grid[1] == 1:
        return b, b  # not read
    products = b.new_empty(batch, grid[1], channels, dtype=dtype)
    ends = torch.empty_like(products)
    _linear_scan_part_kernel[grid](
        a, b, products, ends, length, channels, part_length, *strides, b.stride(0), b.stride(1),
        REVERSE=reverse, SHIFT=shift, ACC=_acc(dtype), **tile,
    )  # fmt: skip
    return products, ends
