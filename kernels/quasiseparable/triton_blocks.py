"""All blocks of a stack of Hydra mixers, one after another, without gradients.

    n = LayerNorm(x);  p = n W_in^T;  c = silu(conv(p));  d = c_x W_D^T
    m the quasiseparable product of c, p and d;  g = m w silu(z);  x = x + (g W_out^T) / rms(m)

A block takes six launches (one more, if rows in pieces are few) on buffers that all blocks share, and the host looks
at their arguments once for all blocks. The mean square that rms needs is known when all heads are done: it scales what
W_out gives, and g is without it. Where dtype is float16, which has no room for that, a kernel of its own makes g.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..causal_conv1d.triton_impl import _group, _place, _taps
from ..causal_conv1d.triton_impl import _tile as conv_tile
from ..gated_norm import triton_impl as gating
from ..replay import replayed
from ..transforms import operator
from ..triton_utils import INTERPRETED, cdiv, launching, multiprocessors, next_power_of_2, on_device, quick
from .blocks import HydraWeights
from .triton_pieces import PieceBuffers, PieceLaunches, heads_tile
from .triton_short import (
    BLOCK_H,
    LONGEST,
    TANH,
    _mix_kernel,
    _silu,
    _write_vectors,
    mix_options,
    piece_of,
    tile_of,
)

# Numbers that are not divided by their root mean square yet may leave their range.
_UNGATED = (torch.float16,)


@quick
@triton.jit(do_not_specialize=["rows"])
def _stream_kernel(
    x_ptr,
    added_ptr,
    squares_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    y_ptr,
    rows,
    channels,
    width,
    parts,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    GATE_EPS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum x + added, SCALED: x + added / sqrt(sum of squares / width + GATE_EPS), and its layer norm."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    ok = (row < rows) & (c < channels)
    x = tl.load(x_ptr + row * channels + c, mask=ok, other=0.0)
    if ADD:
        added = tl.load(added_ptr + row * channels + c, mask=ok, other=0.0).to(tl.float32)
        if SCALED:
            part = tl.arange(0, BLOCK_PARTS)[None, :]
            squares = tl.load(squares_ptr + row * parts + part, mask=(row < rows) & (part < parts), other=0.0)
            added *= (1.0 / tl.sqrt(tl.sum(squares, axis=1) / width + GATE_EPS))[:, None]
        x += added
        tl.store(total_ptr + row * channels + c, x, mask=ok)
    if NORM:
        x = tl.where(c < channels, x - (tl.sum(x, axis=1) / channels)[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / channels + EPS)
        weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0)
        bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0)
        tl.store(y_ptr + row * channels + c, x * scale[:, None] * weight + bias, mask=ok)


@quick
@triton.jit(do_not_specialize=["batch", "length", "part", "heads", "convolving"])
def _inputs_kernel(
    p_ptr,
    filters_ptr,
    conv_bias_ptr,
    dt_f_ptr,
    dt_b_ptr,
    bias_ptr,
    A_log_ptr,
    c_ptr,
    vectors_ptr,
    ends_ptr,
    batch,
    length,
    part,
    heads,
    convolving,
    channels: tl.constexpr,
    width: tl.constexpr,
    K: tl.constexpr,
    PIECE: tl.constexpr,
    ENDS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TANH: tl.constexpr,
):
    """The first `convolving` programs: silu of the centred convolution. The others: see `_vectors_kernel`.

    A program walks along a part of a row with the last K inputs of a few channels in registers.
    """
    program = tl.program_id(0)
    if program < convolving:
        row, start, channel = _place(program, length, channels, part, BLOCK_C)
        ok = channel < channels
        p_ptr += row * length * width
        c_ptr += row * length * channels
        taps = _taps(filters_ptr, channel, ok, K)
        bias = tl.load(conv_bias_ptr + channel, mask=ok, other=0.0)
        newest = start + K // 2  # under the last tap
        window = (tl.zeros([BLOCK_C], tl.float32),)
        earlier = _group(p_ptr, newest - (K - 1), length, width, channel, ok, K - 1)
        for i in tl.static_range(K - 1):
            window = window + (earlier[i].to(tl.float32),)
        ahead = _group(p_ptr, newest, length, width, channel, ok, GROUP)
        stop = tl.minimum(start + part, length)
        for t in range(start, stop, GROUP):
            group = ahead
            ahead = _group(p_ptr, t + K // 2 + GROUP, length, width, channel, ok, GROUP)
            for i in tl.static_range(GROUP):
                window = window[1:] + (group[i].to(tl.float32),)
                y = bias
                for tap in tl.static_range(K):
                    y += taps[tap] * window[tap]
                tl.store(c_ptr + (t + i) * channels + channel, _silu(y, TANH), mask=(t + i < stop) & ok)
    else:
        blocks = tl.cdiv(heads, BLOCK_H)
        place = ((program - convolving) // blocks).to(tl.int64)
        h = (program - convolving) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        _write_vectors(
            dt_f_ptr, dt_b_ptr, bias_ptr, A_log_ptr, vectors_ptr, ends_ptr, None, place, h, batch, length, heads,
            length * width, width, PIECE, ENDS, False,
        )  # fmt: skip


class _Buffers(NamedTuple):
    """What all blocks write to and read from: tensors, or their addresses."""

    total: Any  # (b, l, d), float32
    squares: Any  # (b l, parts), float32
    n: Any  # (b l, d)
    o: Any  # (b l, d)
    p: Any  # (b l, width), first z
    p_mixed: Any
    p_dt_f: Any
    p_dt_b: Any
    c: Any  # (b l, mixed), first x
    B_f: Any
    C_f: Any
    B_b: Any
    C_b: Any
    d: Any  # (b l, h and a few more)
    m: Any  # (b l, d_inner)
    g: Any  # (b l, d_inner)


@operator("hydra_blocks_triton")
@replayed
def hydra_blocks_triton(
    x: Tensor, weights: list[Tensor], headdim: int, d_state: int, eps: float, gate_eps: float, dtype: torch.dtype
) -> Tensor:
    """See `hydra_blocks`; the weights of all blocks in one list, of sizes that it has checked."""
    x, size = x.contiguous(), len(HydraWeights._fields)
    weights = [_aligned(one) for one in weights]
    blocks = [HydraWeights(*weights[k : k + size]) for k in range(0, len(weights), size)]
    products = narrow(blocks, dtype, torch.empty)
    (batch, length, channels), rows = x.shape, x.shape[0] * x.shape[1]
    (nheads, d_inner), (mixed, _, k) = blocks[0].from_x.shape, blocks[0].conv.shape
    maps = (mixed - d_inner) // 4
    repeats, piece = nheads * d_state // maps, piece_of(length)
    gated, long, short = dtype not in _UNGATED, length > LONGEST, tile_of(repeats)
    parts = nheads // (heads_tile(repeats) if long else short).heads
    width, width_D = products[0].shape[1], products[1].shape[1]

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device=x.device)

    p, c = empty(rows, width), empty(rows, mixed)
    B_f, C_f, B_b, C_b = c[:, d_inner:].split(maps, dim=1)
    tensors = _Buffers(
        total=empty(*x.shape, kind=torch.float32),
        squares=empty(rows, parts, kind=torch.float32) if gated else None,
        n=empty(rows, channels),
        o=empty(rows, channels),
        p=p,
        p_mixed=p[:, d_inner:],
        p_dt_f=p[:, d_inner + mixed :],
        p_dt_b=p[:, d_inner + mixed + nheads :],
        c=c,
        B_f=B_f,
        C_f=C_f,
        B_b=B_b,
        C_b=C_b,
        d=None if long else empty(rows, width_D),
        m=None if gated else empty(rows, d_inner),
        g=empty(rows, d_inner),
    )
    c_stride = length * mixed, mixed
    columns = next_power_of_2(channels)
    block_r = max(1, min(next_power_of_2(rows), (16384 if INTERPRETED else 2048) // columns))
    begin, join, end = (
        launching(
            _stream_kernel, (cdiv(rows, block_r),), rows, channels, d_inner, parts, ADD=add, SCALED=add and gated,
            NORM=norm, EPS=eps, GATE_EPS=gate_eps, BLOCK_PARTS=next_power_of_2(parts), BLOCK_R=block_r, BLOCK=columns,
            num_warps=4 if columns <= 2048 else 8,
        )
        for add, norm in ((False, True), (True, True), (True, False))
    )  # fmt: skip
    tile, part = _conv_tile(batch, length, mixed, x.device)
    convolving = batch * cdiv(length, part) * cdiv(mixed, tile["BLOCK_C"])
    inputs = launching(
        _inputs_kernel, (convolving + batch * cdiv(length, piece) * cdiv(nheads, BLOCK_H),), batch, length, part,
        nheads, convolving, mixed, width, K=k, PIECE=piece, ENDS=long, BLOCK_H=BLOCK_H, TANH=TANH and gated, **tile,
    )  # fmt: skip
    if long:
        mix_pieces = PieceLaunches(
            batch, length, nheads, headdim, d_state, nheads // repeats, width, dtype, x.device, gated=gated
        )
        between = mix_pieces.buffers()
    else:
        mix = launching(
            _mix_kernel, (batch * cdiv(length, short.rows) * parts,), batch, length, nheads, repeats, *c_stride,
            *c_stride, width_D, width, **mix_options(dtype, headdim, d_state, length, short), GATED=gated,
        )  # fmt: skip
        between = PieceBuffers(empty(4, batch, nheads, piece, kind=torch.float32), None, None, None, None)
    norm_tile = gating._tile(rows, d_inner)
    gate = launching(
        gating._gated_norm_fwd_kernel, (cdiv(rows, norm_tile["BLOCK_R"]), 1), rows, d_inner, d_inner, d_inner, width,
        EPS=gate_eps, NORM_FIRST=True, ACC=tl.float32, **norm_tile,
    )  # fmt: skip
    u = c[:, :d_inner]
    with on_device(x):
        begin(x, None, None, blocks[0].norm, blocks[0].norm_bias, None, tensors.n)
        for number, block in enumerate(blocks):
            if number:
                before = x if number == 1 else tensors.total
                join(before, tensors.o, tensors.squares, block.norm, block.norm_bias, tensors.total, tensors.n)
            W_in, W_D, W_out = products[3 * number : 3 * number + 3]
            torch.mm(tensors.n, W_in, out=p)
            inputs(
                tensors.p_mixed, block.conv, block.conv_bias, tensors.p_dt_f, tensors.p_dt_b, block.dt_bias,
                block.A_log, tensors.c, between.vectors, between.ends,
            )  # fmt: skip
            rest = (tensors.p, block.gate, tensors.g, tensors.squares) if gated else (None, None, tensors.m, None)
            maps_of = tensors.B_f, tensors.C_f, tensors.B_b, tensors.C_b
            if long:
                mix_pieces(tensors.c, maps_of, W_D, block.D, between, rest)
            else:
                torch.mm(u, W_D, out=tensors.d)
                mix(tensors.c, *maps_of, between.vectors, tensors.d, block.D, *rest)
            if not gated:
                gate(tensors.m, tensors.p, block.gate, tensors.g)
            torch.mm(tensors.g, W_out, out=tensors.o)
        end(x if len(blocks) == 1 else tensors.total, tensors.o, tensors.squares, None, None, tensors.total, None)
    return tensors.total


@torch.library.register_fake("ssm::hydra_blocks_triton")
def _(
    x: Tensor, weights: list[Tensor], headdim: int, d_state: int, eps: float, gate_eps: float, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape)


def _conv_tile(batch: int, length: int, channels: int, device: torch.device) -> tuple[dict[str, int], int]:
    """That of the convolution; in even parts of about 98 positions, where these still fill the device.

    Eight positions at a time: with seven filters that is a tenth faster than four on an H100.
    """
    options, part = conv_tile(channels, 2, length, False)
    options = options | {"GROUP": 4 if INTERPRETED else 8}
    even = cdiv(length, max(1, length // 98))
    programs = batch * cdiv(length, even) * cdiv(channels, options["BLOCK_C"])
    return options, even if part < even <= 2 * part and programs >= 8 * multiprocessors(device) else part


def narrow(
    blocks: Sequence[HydraWeights], dtype: torch.dtype, make: Callable[..., Tensor] = torch.zeros
) -> list[Tensor]:
    """W_in, W_D and W_out of each block, transposed and rounded by one launch for all.

    Columns are added to the first two, up to a multiple of 16: products of other widths run at a fraction of the speed,
    and what they give would be read number by number, as Triton does where a stride is no such multiple. Gradients need
    zeros there; `torch.empty` will do where nobody reads what these columns give.
    """
    weights = [part for own in blocks for part in (own.in_proj, own.from_x, own.out_proj)]
    sizes = [
        (one.shape[0] if k % 3 == 2 else cdiv(one.shape[0], 16) * 16, one.shape[1]) for k, one in enumerate(weights)
    ]
    buffer = make(sum(rows * columns for rows, columns in sizes), dtype=dtype, device=weights[0].device)
    targets, found, place = [], [], 0
    for one, (rows, columns) in zip(weights, sizes, strict=True):
        targets.append(buffer.as_strided(one.shape, (columns, 1), place))
        found.append(buffer.as_strided((columns, rows), (1, columns), place))
        place += rows * columns
    torch._foreach_copy_(targets, weights)
    return found


def _aligned(weight: Tensor) -> Tensor:
    """A contiguous tensor at an address that is a multiple of 16, so that one compiled kernel serves all blocks."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()
