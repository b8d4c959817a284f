"""The convolution in Triton: one tile [time, channels] a program; the k taps re-read the tile from the first cache.

Backward is one kernel. A tile of dx needs dz = dy act'(z) at k positions, each of which needs z at k more: 2k - 1
shifted reads of x and k of dy, all but one of them from cache, and nothing is written in between. Gradients of weight
and bias leave each program as one partial sum; the sums are added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transforms import FirstDerivative, fold, unfold
from ..triton_utils import INTERPRETED, last_contiguous, on_device


@triton.jit
def _tap(x_base, seq_base, position, ok, seq, x_length, x_stride_t, PACKED: tl.constexpr, ACC: tl.constexpr):
    """x at `position`, zero outside of x and in another sequence than `seq`."""
    ok = ok & (position >= 0) & (position < x_length)
    if PACKED:
        ok = ok & (tl.load(seq_base + position, mask=(position >= 0) & (position < x_length), other=0) == seq)
    return tl.load(x_base + position * x_stride_t, mask=ok, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["length", "x_length"])
def _causal_conv1d_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    seq_ptr,
    y_ptr,
    length,
    x_length,
    channels,
    x_stride_b,
    x_stride_t,
    K: tl.constexpr,
    LEFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(length, BLOCK_T)
    row = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    tile = (tl.program_id(0) // blocks % tiles).to(tl.int64)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    ok = (t < length) & channel_ok[None, :]
    x_base = x_ptr + row * x_stride_b + channel[None, :]
    seq, seq_base = t, x_base
    if PACKED:
        seq_base = seq_ptr + row * x_length
        seq = tl.load(seq_base + t + (x_length - length), mask=t < length, other=0)
    y = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=channel_ok, other=0.0)[None, :]
    for i in tl.static_range(K):
        w = tl.load(weight_ptr + channel * K + i, mask=channel_ok, other=0.0)
        y += w[None, :] * _tap(x_base, seq_base, t + (i - LEFT), ok, seq, x_length, x_stride_t, PACKED, ACC)
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + (row * length + t) * channels + channel[None, :], y, mask=ok)


@triton.jit(do_not_specialize=["length", "x_length"])
def _causal_conv1d_bwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    seq_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    length,
    x_length,
    channels,
    x_stride_b,
    x_stride_t,
    K: tl.constexpr,
    LEFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program takes TILES tiles of positions of x. Rows 0 .. K-1 of its partial are dweight, row K is dbias."""
    blocks = tl.cdiv(channels, BLOCK_C)
    groups = tl.cdiv(x_length, BLOCK_T * TILES)
    place = tl.program_id(0) // blocks
    row = (place // groups).to(tl.int64)
    begin = (place % groups).to(tl.int64) * (BLOCK_T * TILES)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    tap = tl.arange(0, BLOCK_K)[:, None]
    x_base = x_ptr + row * x_stride_b + channel[None, :]
    dy_base = dy_ptr + row * length * channels + channel[None, :]
    dx_base = dx_ptr + row * x_length * channels + channel[None, :]
    seq_base = x_base
    if PACKED:
        seq_base = seq_ptr + row * x_length
    bias = tl.zeros([BLOCK_C], ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel_ok, other=0.0)
    partial = tl.zeros([BLOCK_K, BLOCK_C], ACC)
    for start in range(begin, tl.minimum(begin + BLOCK_T * TILES, x_length), BLOCK_T):
        s = start + tl.arange(0, BLOCK_T)[:, None]  # position in x; also the index of the output in partial sums
        s_ok = (s < x_length) & channel_ok[None, :]
        dx = tl.zeros([BLOCK_T, BLOCK_C], ACC)
        own = s
        if PACKED:
            own = tl.load(seq_base + s, mask=s < x_length, other=0)
        for i in tl.static_range(K):
            t = s + (LEFT - i)  # the output that sees x_s through tap i
            t_inside = (t >= 0) & (t < length)
            t_ok = t_inside & channel_ok[None, :]
            dz = tl.load(dy_base + t * channels, mask=t_ok, other=0.0).to(ACC)
            seq = s
            if PACKED:
                seq = tl.load(seq_base + t + (x_length - length), mask=t_inside, other=-1)
            if SILU:
                z = tl.zeros([BLOCK_T, BLOCK_C], ACC) + bias[None, :]
                for j in tl.static_range(K):
                    w = tl.load(weight_ptr + channel * K + j, mask=channel_ok, other=0.0)
                    z += w[None, :] * _tap(x_base, seq_base, s + (j - i), t_ok, seq, x_length, x_stride_t, PACKED, ACC)
                gate = tl.sigmoid(z)
                dz = dz * gate * (1.0 + z * (1.0 - gate))
            if i == LEFT:  # t = s: every output is counted once
                for j in tl.static_range(K):
                    x = _tap(x_base, seq_base, s + (j - i), t_ok, seq, x_length, x_stride_t, PACKED, ACC)
                    partial += tl.where(tap == j, tl.sum(dz * x, axis=0)[None, :], 0.0)
                partial += tl.where(tap == K, tl.sum(dz, axis=0)[None, :], 0.0)
            w = tl.load(weight_ptr + channel * K + i, mask=channel_ok, other=0.0)
            if PACKED:
                dz = tl.where(seq == own, dz, 0.0)
            dx += w[None, :] * dz
        tl.store(dx_base + s * channels, dx, mask=s_ok)
    out = (place.to(tl.int64) * (K + 1) + tap) * channels + channel[None, :]
    tl.store(partial_ptr + out, partial, mask=(tap <= K) & channel_ok[None, :])


def causal_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    """See `causal_conv1d_reference`."""
    return _Convolution.apply(x, weight, bias, seq_idx, left, length, silu)


@torch.library.custom_op("ssm::causal_conv1d_triton_fwd", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    x, weight, bias = last_contiguous(x), weight.contiguous(), None if bias is None else bias.contiguous()
    batch, x_length, channels = x.shape
    y = x.new_empty(batch, length, channels)
    blocks = _blocks(length, channels)
    grid = (batch * triton.cdiv(length, blocks["BLOCK_T"]) * triton.cdiv(channels, blocks["BLOCK_C"]),)
    with on_device(x):
        _causal_conv1d_fwd_kernel[grid](
            x, weight, bias, None if seq_idx is None else seq_idx.contiguous(), y, length, x_length, channels,
            x.stride(0), x.stride(1), **_options(weight, bias, seq_idx, left, silu), **blocks,
        )  # fmt: skip
    return y


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    return x.new_empty(x.shape[0], length, x.shape[2])


@torch.library.custom_op("ssm::causal_conv1d_triton_bwd", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, dy: Tensor, left: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the last one in any case."""
    dx, dy = x.new_empty(x.shape), dy.contiguous()
    x, weight, bias = last_contiguous(x), weight.contiguous(), None if bias is None else bias.contiguous()
    batch, x_length, channels = x.shape
    k = weight.shape[1]
    blocks = _blocks(x_length, channels)
    tiles = 8
    places = batch * triton.cdiv(x_length, tiles * blocks["BLOCK_T"])
    partial = weight.new_empty(places, k + 1, channels)
    with on_device(x):
        _causal_conv1d_bwd_kernel[(places * triton.cdiv(channels, blocks["BLOCK_C"]),)](
            x, weight, bias, None if seq_idx is None else seq_idx.contiguous(), dy, dx, partial,
            dy.shape[1], x_length, channels, x.stride(0), x.stride(1),
            **_options(weight, bias, seq_idx, left, silu), **blocks,
            BLOCK_K=triton.next_power_of_2(k + 1), TILES=tiles,
        )  # fmt: skip
    total = partial.sum(0)
    return dx, total[:k].t().contiguous(), total[k].clone()


@_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, dy: Tensor, left: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


class _Convolution(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
    ) -> Tensor:
        return _forward(x, weight, bias, seq_idx, left, length, silu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, seq_idx, ctx.left, _, ctx.silu = inputs
        ctx.save_for_backward(x, weight, bias, seq_idx)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, seq_idx = ctx.saved_tensors
        dx, dweight, dbias = _ConvolutionGradient.apply(x, weight, bias, seq_idx, dy, ctx.left, ctx.silu)
        return dx, dweight, None if bias is None else dbias, None, None, None, None


class _ConvolutionGradient(FirstDerivative):
    name = "causal_conv1d"

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, dy: Tensor, left: int, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(x, weight, bias, seq_idx, dy, left, silu)


def _each(tensor: Tensor | None, mapped: int | None, count: int) -> list[Tensor | None]:
    if tensor is None or mapped is None:
        return [tensor] * count
    return list(tensor.unbind(mapped))


@_forward.register_vmap
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    left: int,
    length: int,
    silu: bool,
) -> tuple[Tensor, int]:
    count = info.batch_size
    if in_dims[1] is None and in_dims[2] is None:
        folded = fold(x, in_dims[0], count), fold(seq_idx, in_dims[3], count)
        return unfold(_forward(folded[0], weight, bias, folded[1], left, length, silu), count), 0
    arguments = [_each(tensor, dim, count) for tensor, dim in zip((x, weight, bias, seq_idx), in_dims)]
    return torch.stack([_forward(*one, left, length, silu) for one in zip(*arguments)]), 0


@_backward.register_vmap
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    left: int,
    silu: bool,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    # Gradients of the parameters are separate sums for each mapped instance, hence separate launches.
    arguments = [_each(tensor, dim, info.batch_size) for tensor, dim in zip((x, weight, bias, seq_idx, dy), in_dims)]
    results = [_backward(*one, left, silu) for one in zip(*arguments)]
    return tuple(torch.stack(parts) for parts in zip(*results)), (0, 0, 0)


def _options(weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, silu: bool) -> dict[str, Any]:
    return {
        "K": weight.shape[1],
        "LEFT": left,
        "HAS_BIAS": bias is not None,
        "PACKED": seq_idx is not None,
        "SILU": silu,
        "ACC": tl.float64 if weight.dtype == torch.float64 else tl.float32,
    }


def _blocks(length: int, channels: int) -> dict[str, int]:
    # 16 bytes per thread and row in 16 bit; 32 positions keep the halo of k - 1 rows below a quarter.
    block_c = triton.next_power_of_2(min(channels, 128 if INTERPRETED else 64))
    return {"BLOCK_T": triton.next_power_of_2(min(length, 64 if INTERPRETED else 32)), "BLOCK_C": block_c}
