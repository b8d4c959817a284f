"""The convolution in Triton: one tile [time, channels] a program; the k taps re-read the tile from the first cache.

    z_t = bias + sum_i weight_i x_{t+i-left},    y = act(z)
    dz = dy act'(z),    dx_s = sum_i weight_i dz_{s+left-i},    dweight_i = sum_t dz_t x_{t+i-left},    dbias = sum dz

Backward is two kernels: dz with the gradients of the parameters, then dx, which is the convolution again with the taps
in the opposite order. Gradients of the parameters leave each program as one partial sum, added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transforms import FirstDerivative, apply, fold, operator, unfold
from ..triton_utils import INTERPRETED, last_contiguous, on_device


@triton.jit
def _place(program, length, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row, first position and channel numbers of a program; channel blocks are neighbours."""
    blocks = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(length, BLOCK_T)
    row = program // blocks // tiles
    start = program // blocks % tiles * BLOCK_T
    return row.to(tl.int64), start.to(tl.int64), program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _tap(tile, offset, first, length, stride, seq_tile, seq, channel_ok, SHIFT: tl.constexpr, PACKED: tl.constexpr):
    """Positions `first + SHIFT ...` of an input: zero outside of it and in another sequence than `seq`."""
    t = first + SHIFT + tl.arange(0, seq.shape[0])[:, None]
    ok = (t >= 0) & (t < length)
    if PACKED:
        other = tl.load(seq_tile + SHIFT + tl.arange(0, seq.shape[0])[:, None], mask=ok, other=0)
        ok = ok & (other == seq)
    return tl.load(tile + SHIFT * stride + offset, mask=ok & channel_ok[None, :], other=0.0)


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
    FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """FLIP takes the taps in the opposite order: the gradient of the input, with `x` and `y` exchanged."""
    row, start, channel = _place(tl.program_id(0), length, channels, BLOCK_T, BLOCK_C)
    channel_ok = channel < channels
    steps = tl.arange(0, BLOCK_T)[:, None]
    offset = steps * x_stride_t + channel[None, :]
    x_tile = x_ptr + row * x_stride_b + start * x_stride_t
    seq, seq_tile = steps, x_ptr
    if PACKED:  # sequence numbers cover the longer one of x and y; both end at the same position
        total = tl.maximum(length, x_length)
        seq_row = seq_ptr + row * total + start
        seq = tl.load(seq_row + (total - length) + steps, mask=steps < length - start, other=0)
        seq_tile = seq_row + (total - x_length)
    y = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=channel_ok, other=0.0)[None, :]
    for i in tl.static_range(K):
        w = tl.load(weight_ptr + channel * K + (K - 1 - i if FLIP else i), mask=channel_ok, other=0.0)
        x = _tap(x_tile, offset, start, x_length, x_stride_t, seq_tile, seq, channel_ok, i - LEFT, PACKED)
        y += w[None, :] * x.to(ACC)
    if SILU:
        y = y * tl.sigmoid(y)
    y_tile = y_ptr + (row * length + start) * channels
    ok = (steps < length - start) & channel_ok[None, :]
    tl.store(y_tile + steps * channels + channel[None, :], y, mask=ok)


@triton.jit(do_not_specialize=["length", "x_length"])
def _causal_conv1d_bwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    seq_ptr,
    dy_ptr,
    dz_ptr,
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
    """dz of TILES tiles, and their part of the parameters' gradients: rows 0 .. K-1 dweight, row K dbias."""
    row, begin, channel = _place(tl.program_id(0), length, channels, BLOCK_T * TILES, BLOCK_C)
    channel_ok = channel < channels
    steps = tl.arange(0, BLOCK_T)[:, None]
    tap = tl.arange(0, BLOCK_K)[:, None]
    offset = steps * x_stride_t + channel[None, :]
    dy_offset = steps * channels + channel[None, :]
    bias = tl.zeros([BLOCK_C], ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel_ok, other=0.0)
    partial = tl.zeros([BLOCK_K, BLOCK_C], ACC)
    for start in range(begin, tl.minimum(begin + BLOCK_T * TILES, length), BLOCK_T):
        ok = (steps < length - start) & channel_ok[None, :]
        tile = (row * length + start) * channels
        x_tile = x_ptr + row * x_stride_b + start * x_stride_t
        seq, seq_tile = steps, x_ptr
        if PACKED:
            seq_tile = seq_ptr + row * x_length + start
            seq = tl.load(seq_tile + (x_length - length) + steps, mask=steps < length - start, other=0)
        dz = tl.load(dy_ptr + tile + dy_offset, mask=ok, other=0.0).to(ACC)
        if SILU:
            z = tl.zeros([BLOCK_T, BLOCK_C], ACC) + bias[None, :]
            for i in tl.static_range(K):
                w = tl.load(weight_ptr + channel * K + i, mask=channel_ok, other=0.0)
                x = _tap(x_tile, offset, start, x_length, x_stride_t, seq_tile, seq, channel_ok, i - LEFT, PACKED)
                z += w[None, :] * x.to(ACC)
            gate = tl.sigmoid(z)
            dz = dz * gate * (1.0 + z * (1.0 - gate))
        for i in tl.static_range(K):
            x = _tap(x_tile, offset, start, x_length, x_stride_t, seq_tile, seq, channel_ok, i - LEFT, PACKED)
            partial += tl.where(tap == i, tl.sum(dz * x.to(ACC), axis=0)[None, :], 0.0)
        partial += tl.where(tap == K, tl.sum(dz, axis=0)[None, :], 0.0)
        tl.store(dz_ptr + tile + dy_offset, dz, mask=ok)
    place = (tl.program_id(0) // tl.cdiv(channels, BLOCK_C)).to(tl.int64)
    out = (place * (K + 1) + tap) * channels + channel[None, :]
    tl.store(partial_ptr + out, partial, mask=(tap <= K) & channel_ok[None, :])


def causal_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    """See `causal_conv1d_reference`."""
    return apply(_Convolution, x, weight, bias, seq_idx, left, length, silu)


@operator("causal_conv1d_triton_fwd")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    return _convolve(last_contiguous(x), weight.contiguous(), bias, seq_idx, left, length, silu, flip=False)


@torch.library.register_fake("ssm::causal_conv1d_triton_fwd")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    return x.new_empty(x.shape[0], length, x.shape[2])


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    left: int,
    length: int,
    silu: bool,
    flip: bool,
) -> Tensor:
    batch, x_length, channels = x.shape
    y = x.new_empty(batch, length, channels)
    tile = _tile(length, channels, x.element_size(), False)
    grid = (batch * triton.cdiv(length, tile["BLOCK_T"]) * triton.cdiv(channels, tile["BLOCK_C"]),)
    with on_device(x):
        _causal_conv1d_fwd_kernel[grid](
            x, weight, _contiguous(bias), _contiguous(seq_idx), y, length, x_length, channels, x.stride(0), x.stride(1),
            FLIP=flip, **_options(weight, bias, seq_idx, left, silu), **tile,
        )  # fmt: skip
    return y


@operator("causal_conv1d_triton_bwd")
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, dy: Tensor, left: int, silu: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and those of weight and bias in one (k + 1, c)."""
    x, weight, dy = last_contiguous(x), weight.contiguous(), dy.contiguous()
    (batch, x_length, channels), length, k = x.shape, dy.shape[1], weight.shape[1]
    dz = torch.empty_like(dy)
    tile = _tile(length, channels, x.element_size(), True)
    tiles = 8
    places = batch * triton.cdiv(length, tiles * tile["BLOCK_T"])
    partial = weight.new_empty(places, k + 1, channels)
    with on_device(x):
        _causal_conv1d_bwd_kernel[(places * triton.cdiv(channels, tile["BLOCK_C"]),)](
            x, weight, _contiguous(bias), _contiguous(seq_idx), dy, dz, partial, length, x_length, channels,
            x.stride(0), x.stride(1), BLOCK_K=triton.next_power_of_2(k + 1), TILES=tiles,
            **_options(weight, bias, seq_idx, left, silu), **tile,
        )  # fmt: skip
    dx = _convolve(dz, weight, None, seq_idx, k - 1 - left, x_length, silu=False, flip=True)
    return dx, partial.sum(0)


@torch.library.register_fake("ssm::causal_conv1d_triton_bwd")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, dy: Tensor, left: int, silu: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape[1] + 1, weight.shape[0])


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
        dx, dparameters = apply(_ConvolutionGradient, x, weight, bias, seq_idx, dy, ctx.left, ctx.silu)
        return dx, dparameters[:-1].mT, None if bias is None else dparameters[-1], None, None, None, None


class _ConvolutionGradient(FirstDerivative):
    name = "causal_conv1d"

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, dy: Tensor, left: int, silu: bool
    ) -> tuple[Tensor, Tensor]:
        return _backward(x, weight, bias, seq_idx, dy, left, silu)


def _each(tensor: Tensor | None, mapped: int | None, count: int) -> list[Tensor | None]:
    if tensor is None or mapped is None:
        return [tensor] * count
    return list(tensor.unbind(mapped))


@torch.library.register_vmap("ssm::causal_conv1d_triton_fwd")
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


@torch.library.register_vmap("ssm::causal_conv1d_triton_bwd")
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
    return tuple(torch.stack(parts) for parts in zip(*results)), (0, 0)


def _options(weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, silu: bool) -> dict[str, Any]:
    return {
        "K": weight.shape[1],
        "LEFT": left,
        "HAS_BIAS": bias is not None,
        "PACKED": seq_idx is not None,
        "SILU": silu,
        "ACC": tl.float64 if weight.dtype == torch.float64 else tl.float32,
    }


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _tile(length: int, channels: int, element_size: int, backward: bool) -> dict[str, int]:
    if INTERPRETED:
        block_t, block_c = triton.next_power_of_2(min(length, 64)), triton.next_power_of_2(min(channels, 128))
        return {"BLOCK_T": block_t, "BLOCK_C": block_c}
    # The fastest of 14 shapes on an H100 for 2304 channels, k = 4; more warps on the same tile were slower throughout.
    if element_size <= 2:
        block_t, block_c, num_warps = (16, 64, 2) if backward else (32, 128, 4)
    else:
        block_t, block_c, num_warps = (4, 256, 2) if backward else (32, 64, 4)
    return {"BLOCK_T": block_t, "BLOCK_C": triton.next_power_of_2(min(channels, block_c)), "num_warps": num_warps}
