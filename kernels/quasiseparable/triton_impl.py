"""`quasiseparable` in Triton: one launch of two sweeps over states, one kernel for the outputs of all chunks.

Per chunk the outputs are `M x` with one matrix for both sides, and what the two states around the chunk add; row t
loads the C of its neighbours, so nothing is rolled, flipped or concatenated. The gradient is that of `ssd` for each
side, the one from the right counting its steps backwards, both with shifted gradients of the outputs; dx is added up
in place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..ssd.op import heads_per_head, in_dtype
from ..ssd.triton_gradients import empty_gradients, run_gradients
from ..ssd.triton_kernels import (
    DESCENDING,
    REVERSE,
    SHIFT,
    _dot_add,
    _dot_nt,
    _halves,
    _last,
    _less,
    _load_state,
    _log2_sums,
    _tile,
    _vector,
    _whole,
    keep_addresses_in_loops,
)
from ..ssd.triton_outputs import Sweep, contiguous, dense_rows, run_sweeps, strides
from ..ssd.triton_tiles import fine_chunk, fine_products, options, padded, tiles
from ..transforms import FirstDerivative, apply, call, fold, operator, unfold
from ..triton_utils import INTERPRETED, cdiv, multiprocessors, on_device, quick
from .reference import Side


@triton.jit
def _border(
    ptr, there, SKIP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A state, [BLOCK_P, BLOCK_N]; with SKIP zeros unless it is there."""
    if SKIP:
        rows, columns = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_N)[None, :]
        state = tl.load(ptr + (rows * N + columns), mask=(rows < P) & (columns < N) & there, other=0.0)
    else:
        state = _load_state(ptr, P, N, BLOCK_P, BLOCK_N)
    return state


@quick
@keep_addresses_in_loops
@triton.jit(do_not_specialize=["length", "nheads", "repeats", "blocks", "block_heads"])
def _quasiseparable_fwd_kernel(
    x_ptr,
    log_decay_f_ptr,
    weight_f_ptr,
    B_f_ptr,
    C_f_ptr,
    log_decay_b_ptr,
    weight_b_ptr,
    B_b_ptr,
    C_b_ptr,
    diag_ptr,
    seq_ptr,
    left_ptr,
    right_ptr,
    y_ptr,
    length,
    nheads,
    repeats,
    blocks,
    block_heads,
    x_stride_b,
    x_stride_t,
    B_f_stride_b,
    B_f_stride_t,
    C_f_stride_b,
    C_f_stride_t,
    B_b_stride_b,
    B_b_stride_t,
    C_b_stride_b,
    C_b_stride_t,
    SHIFTED: tl.constexpr,
    HAS_WEIGHT_F: tl.constexpr,
    HAS_WEIGHT_B: tl.constexpr,
    SKIP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs of one chunk, for one head after another of a block of a group's heads."""
    block = tl.program_id(0) % blocks
    groups = nheads // repeats
    group = tl.program_id(0) // blocks % groups
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) // blocks // groups % chunks
    row = (tl.program_id(0) // blocks // groups // chunks).to(tl.int64)
    first = group * repeats + block * block_heads
    steps = tl.arange(0, Q)
    begin = chunk.to(tl.int64) * Q
    ok = steps < tl.minimum(length - begin, Q).to(tl.int32)
    before = begin
    after = begin
    before_ok = ok
    after_ok = ok
    if SHIFTED:
        before = begin - 1
        after = begin + 1
        before_ok = ok & (steps + begin > 0)
        after_ok = steps + 1 < length - begin
    index = steps
    left_index = 0
    right_index = 0
    if PACKED:
        seq_row = seq_ptr + row * length
        index = tl.load(seq_row + begin + steps, mask=ok, other=-1)
        left_index = tl.load(seq_row + tl.maximum(begin - 1, 0))
        right_index = tl.load(seq_row + tl.minimum(begin + Q, length - 1))
        if SHIFTED:
            before_ok = before_ok & (tl.load(seq_row + before + steps, mask=before_ok, other=-1) == index)
            after_ok = after_ok & (tl.load(seq_row + after + steps, mask=after_ok, other=-1) == index)
    in_group = group * N
    B_f = _tile(B_f_ptr + row * B_f_stride_b + in_group, begin, steps, ok, B_f_stride_t, N, BLOCK_N, DOT)
    C_f = _tile(C_f_ptr + row * C_f_stride_b + in_group, before, steps, before_ok, C_f_stride_t, N, BLOCK_N, DOT)
    B_b = _tile(B_b_ptr + row * B_b_stride_b + in_group, begin, steps, ok, B_b_stride_t, N, BLOCK_N, DOT)
    C_b = _tile(C_b_ptr + row * C_b_stride_b + in_group, after, steps, after_ok, C_b_stride_t, N, BLOCK_N, DOT)
    B_f, B_f_low = _halves(B_f, PRECISION)
    C_f, C_f_low = _halves(C_f, PRECISION)
    B_b, B_b_low = _halves(B_b, PRECISION)
    C_b, C_b_low = _halves(C_b, PRECISION)
    # With the shift nothing is read on the diagonal, and one matrix serves both sides and all heads.
    every = _dot_nt(C_f, C_f_low, B_f, B_f_low, ACC, PRECISION)
    if SHIFTED:
        every = tl.where(steps[:, None] > steps[None, :], every, _dot_nt(C_b, C_b_low, B_b, B_b_low, ACC, PRECISION))
    p_columns = tl.arange(0, BLOCK_P)
    y_ok = ok[:, None]
    if P < BLOCK_P:
        y_ok = y_ok & (p_columns < P)[None, :]
    last = tl.minimum(first + block_heads, (group + 1) * repeats)
    for head in tl.range(first, last, num_stages=STAGES, disable_licm=True):
        # The steps again, but not as constants: masks that are kept over the loop would fill the registers.
        own = steps + tl.minimum(head, 0)
        vectors = row * length * nheads + head
        decay_f = _vector(log_decay_f_ptr + vectors, begin, steps, ok, nheads, ACC)
        decay_b = _vector(log_decay_b_ptr + vectors, begin, steps, ok, nheads, ACC)
        high_f, low_f, step_high_f, step_low_f = _log2_sums(decay_f, ACC, EXACT)
        high_b, low_b, step_high_b, step_low_b = _log2_sums(decay_b, ACC, EXACT)
        # Sums before each step: of the decays that a state read there has passed (f), or passes from there on (b).
        before_high_b = high_b - step_high_b
        before_low_b = low_b - step_low_b
        row_high_f, row_low_f, row_high_b, row_low_b = high_f, low_f, before_high_b, before_low_b
        if SHIFTED:
            row_high_f, row_low_f, row_high_b, row_low_b = high_f - step_high_f, low_f - step_low_f, high_b, low_b
        from_left = tl.exp2(_whole(row_high_f, row_low_f, EXACT))
        from_right = tl.exp2(_less(_last(high_b, Q), _last(low_b, Q), row_high_b, row_low_b, EXACT))
        past = own[:, None] > own[None, :]
        future = own[:, None] < own[None, :]
        if not SHIFTED:
            past = past | (own[:, None] == own[None, :])
            future = own[:, None] <= own[None, :]
        if PACKED:
            of = index + (own - steps)
            past = past & (of[:, None] == of[None, :])
            future = future & (of[:, None] == of[None, :])
            from_left = tl.where(index == left_index, from_left, 0.0)
            from_right = tl.where(index == right_index, from_right, 0.0)
        between_f = _less(row_high_f[:, None], row_low_f[:, None], high_f[None, :], low_f[None, :], EXACT)
        between_b = _less(before_high_b[None, :], before_low_b[None, :], row_high_b[:, None], row_low_b[:, None], EXACT)
        decays_f = tl.exp2(tl.where(past, between_f, float("-inf")))  # [t, s]
        decays_b = tl.exp2(tl.where(future, between_b, float("-inf")))
        if HAS_WEIGHT_F:
            decays_f = decays_f * _vector(weight_f_ptr + vectors, begin, steps, ok, nheads, ACC)[None, :]
        if HAS_WEIGHT_B:
            decays_b = decays_b * _vector(weight_b_ptr + vectors, begin, steps, ok, nheads, ACC)[None, :]
        if SHIFTED:
            found = every * (decays_f + decays_b)
        else:
            found = every * decays_f + _dot_nt(C_b, C_b_low, B_b, B_b_low, ACC, PRECISION) * decays_b
        mixing, mixing_low = _halves(found.to(DOT), PRECISION)
        border = ((row * nheads + head) * chunks + chunk) * (P * N)
        left = _border(left_ptr + border, chunk > 0, SKIP, P, N, BLOCK_P, BLOCK_N).to(DOT)
        right = _border(right_ptr + border, chunk + 1 < chunks, SKIP, P, N, BLOCK_P, BLOCK_N).to(DOT)
        left, left_low = _halves(left, PRECISION)
        right, right_low = _halves(right, PRECISION)
        x = _tile(x_ptr + row * x_stride_b + head * P, begin, steps, ok, x_stride_t, P, BLOCK_P, DOT)
        y = _dot_nt(C_f, C_f_low, left, left_low, ACC, PRECISION) * from_left[:, None]
        y += _dot_nt(C_b, C_b_low, right, right_low, ACC, PRECISION) * from_right[:, None]
        y += _vector(diag_ptr + vectors, begin, steps, ok, nheads, ACC)[:, None] * x.to(ACC)
        v, v_low = _halves(x, PRECISION)
        y = _dot_add(mixing, mixing_low, v, v_low, y, ACC, PRECISION)
        y_tile = y_ptr + vectors * P + begin * (nheads * P)
        tl.store(y_tile + (steps[:, None] * (nheads * P) + p_columns[None, :]), y, mask=y_ok)


def quasiseparable_triton(
    x: Tensor, forward: Side, backward: Side, diag: Tensor, state: Tensor | None, shift: bool, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `quasiseparable_reference`; x is as the caller gave it."""
    dtype, narrow = x.dtype, x.dtype
    for one in (forward.B, forward.C, backward.B, backward.C):
        narrow = torch.promote_types(narrow, one.dtype)
    if diag.dtype == torch.float64:
        narrow = diag.dtype
    batch, length, nheads, headdim = x.shape
    cut = heads_per_head(headdim, forward.B.shape[3])
    assert cut is not None  # checked by the op
    vectors = [forward.log_decay, forward.weight, backward.log_decay, backward.weight, diag]
    if cut > 1:
        x = x.reshape(batch, length, nheads * cut, headdim // cut)
        vectors = [None if one is None else one.repeat_interleave(cut, dim=2) for one in vectors]
        state = None if state is None else state.reshape(2, batch, nheads * cut, headdim // cut, -1)
    decay_f, weight_f, decay_b, weight_b, diagonal = vectors
    x, B_f, C_f, B_b, C_b = (in_dtype(one, narrow) for one in (x, forward.B, forward.C, backward.B, backward.C))
    y, final = apply(
        _Quasiseparable, x, decay_f, weight_f, B_f, C_f, decay_b, weight_b, B_b, C_b, diagonal, state, seq_idx, shift
    )
    if cut > 1:
        y, final = y.reshape(batch, length, nheads, headdim), final.reshape(2, batch, nheads, headdim, -1)
    return in_dtype(y, dtype), final


@operator("quasiseparable_triton_fwd")
@replayed
def _forward(
    x: Tensor,
    log_decay_f: Tensor,
    weight_f: Tensor | None,
    B_f: Tensor,
    C_f: Tensor,
    log_decay_b: Tensor,
    weight_b: Tensor | None,
    B_b: Tensor,
    C_b: Tensor,
    diag: Tensor,
    state: Tensor | None,
    seq_idx: Tensor | None,
    shift: bool,
    chunk: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """`chunk` and `parts` (of a row) are 0 to be chosen."""
    x, B_f, C_f, B_b, C_b = (dense_rows(one) for one in (x, B_f, C_f, B_b, C_b))
    log_decay_f, weight_f, seq_idx = log_decay_f.contiguous(), contiguous(weight_f), contiguous(seq_idx)
    log_decay_b, weight_b, diag = log_decay_b.contiguous(), contiguous(weight_b), diag.contiguous()
    left, right = (None, None) if state is None else state.contiguous().unbind(0)
    (batch, length, nheads, _), (groups, n) = x.shape, B_f.shape[2:]
    chosen, sweeping = (tiles(kernel, *padded(x, n), x.dtype) for kernel in ("two-sided", "sweep"))
    chosen = chosen._replace(chunk=chunk) if chunk else chosen
    sweeping = sweeping._replace(chunk=chosen.chunk)
    y = x.new_empty(x.shape)
    repeats = nheads // groups
    programs = batch * cdiv(length, chosen.chunk) * groups
    places = 2 * multiprocessors(x.device)  # of programs at a time
    blocks = max(1, min(repeats, places // programs or cdiv(2 * places, programs)))
    block_heads = cdiv(repeats, blocks)
    blocks = cdiv(repeats, block_heads)
    # Masks of loads that are not sent ahead would fill the registers.
    skip = state is None and (INTERPRETED or chosen.stages > 1)
    sweeps = (
        Sweep(x, B_f, log_decay_f, weight_f, left, 0),
        Sweep(x, B_b, log_decay_b, weight_b, right, DESCENDING),
    )
    with on_device(x):
        borders, finals = run_sweeps(sweeps, seq_idx, sweeping, 1, parts, skip=skip)
        _quasiseparable_fwd_kernel[(programs * blocks,)](
            x, log_decay_f, weight_f, B_f, C_f, log_decay_b, weight_b, B_b, C_b, diag, seq_idx, borders[0], borders[1],
            y, length, nheads, repeats, blocks, block_heads, *strides(x, B_f, C_f, B_b, C_b), SHIFTED=shift,
            HAS_WEIGHT_F=weight_f is not None, HAS_WEIGHT_B=weight_b is not None, SKIP=skip,
            **options(x, n, log_decay_f, seq_idx, chosen),
        )  # fmt: skip
    return y, finals


@torch.library.register_fake("ssm::quasiseparable_triton_fwd")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, log_decay, B = arguments[0], arguments[1], arguments[3]
    return x.new_empty(x.shape), log_decay.new_empty(2, x.shape[0], *x.shape[2:], B.shape[3])


@operator("quasiseparable_triton_bwd")
@replayed
def _backward(
    x: Tensor,
    log_decay_f: Tensor,
    weight_f: Tensor | None,
    B_f: Tensor,
    C_f: Tensor,
    log_decay_b: Tensor,
    weight_b: Tensor | None,
    B_b: Tensor,
    C_b: Tensor,
    diag: Tensor,
    state: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    shift: bool,
    chunk: int,
    parts: int,
    blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of the arguments, those of the two states apart; of absent weights without positions."""
    x, B_f, C_f, B_b, C_b = (dense_rows(one) for one in (x, B_f, C_f, B_b, C_b))
    log_decay_f, weight_f, seq_idx = log_decay_f.contiguous(), contiguous(weight_f), contiguous(seq_idx)
    log_decay_b, weight_b, diag, dy = log_decay_b.contiguous(), contiguous(weight_b), diag.contiguous(), dy.contiguous()
    left, right = (None, None) if state is None else state.contiguous().unbind(0)
    dleft, dright = (None, None) if dfinal is None else dfinal.contiguous().unbind(0)
    shifted = SHIFT if shift else 0
    fine, chunk = fine_products(x, B_f.shape[3]), chunk or fine_chunk(x, B_f.shape[3])
    from_left = Sweep(x, B_f, log_decay_f, weight_f, left, shifted, fine)
    from_right = Sweep(x, B_b, log_decay_b, weight_b, right, shifted | REVERSE, fine)
    one = empty_gradients(from_left, C_f, diag)
    two = empty_gradients(from_right, C_b, None, one.dx)
    with on_device(x):
        run_gradients(from_left, C_f, diag, seq_idx, dy, dleft, one, chunk=chunk, parts=parts, blocks=blocks)
        run_gradients(
            from_right, C_b, None, seq_idx, dy, dright, two, add=True, chunk=chunk, parts=parts, blocks=blocks
        )  # fmt: skip
    return (
        one.dx, one.dlog_decay, one.dweight, one.dB, one.dC, two.dlog_decay, two.dweight, two.dB, two.dC, one.dD,
        one.dstate, two.dstate,
    )  # fmt: skip


@torch.library.register_fake("ssm::quasiseparable_triton_bwd")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x, log_decay_f, weight_f, B_f, C_f, log_decay_b, weight_b, B_b, C_b, diag = arguments[:10]
    absent = x.new_empty(x.shape[0], 0, x.shape[2], dtype=log_decay_f.dtype)
    given = (x, log_decay_f, weight_f, B_f, C_f, log_decay_b, weight_b, B_b, C_b, diag)
    states = (log_decay_f.new_empty(x.shape[0], *x.shape[2:], B_f.shape[3]) for _ in range(2))
    return *(torch.empty_like(absent) if one is None else one.new_empty(one.shape) for one in given), *states


class _Quasiseparable(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return call(_forward, *arguments, 0, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.shift = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, state, seq_idx = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(tensors[0])
        *found, dleft, dright = apply(_QuasiseparableGradient, *tensors, state, seq_idx, dy, dfinal, ctx.shift)
        wanted = (None if given is None else one for given, one in zip(tensors, found, strict=True))
        return *wanted, None if state is None else torch.stack([dleft, dright]), None, None


class _QuasiseparableGradient(FirstDerivative):
    name = "quasiseparable"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return call(_backward, *arguments, 0, 0, 0)


def _fold_states(states: Tensor | None, dim: int | None, count: int) -> Tensor | None:
    """(2, b, ...) mapped along `dim` -> (2, count * b, ...)."""
    if states is None:
        return None
    wide = states.expand(count, *states.shape) if dim is None else states.movedim(dim, 0)
    return wide.movedim(0, 1).flatten(1, 2)


def _folded(info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...], states: tuple[int, ...]) -> list[Any]:
    return [
        (_fold_states if k in states else fold)(one, dim, info.batch_size) if isinstance(one, Tensor) else one
        for k, (one, dim) in enumerate(zip(arguments, in_dims, strict=True))
    ]


@torch.library.register_vmap("ssm::quasiseparable_triton_fwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    y, final = _forward(*_folded(info, in_dims, arguments, (10,)))
    return (unfold(y, info.batch_size), final.unflatten(1, (info.batch_size, -1))), (0, 1)


@torch.library.register_vmap("ssm::quasiseparable_triton_bwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    found = _backward(*_folded(info, in_dims, arguments, (10, 13)))
    return tuple(unfold(one, info.batch_size) for one in found), (0,) * len(found)
