"""The convolution in plain PyTorch: k shifted multiply-adds, which torch.compile fuses into one pass.

In eager mode on a CPU, where nothing is packed, oneDNN convolves pieces of the input that fit the cache, channels last:

    dpre_t = dy_t act'(pre_t),    dx_s = sum_i weight_i dpre_{s+left-i},    dweight_i = sum_t dpre_t x_{t-left+i}

For the gradient only the inputs are kept; what comes before the activation is formed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..transforms import apply, traced, transforming

# Numbers of a piece: a few buffers of it fit a last-level cache, and its work outweighs what a call of oneDNN costs.
_PIECE = 1 << 20


def causal_conv1d_chunked(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    """See `causal_conv1d_reference`."""
    if seq_idx is None and by_onednn(x, weight):
        return apply(_Pieces, x, weight, bias, left, length, silu)
    return _shifted(x, weight, bias, seq_idx, left, length, silu)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing traces or transforms a call, and oneDNN has this convolution."""
    if traced() or transforming() or x.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available()


def _shifted(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    k, extra = weight.shape[1], x.shape[1] - length
    right = k - 1 - left - extra
    wide = F.pad(x.to(weight.dtype), (0, 0, left, right))
    y = torch.zeros((), dtype=weight.dtype, device=x.device) if bias is None else bias
    index = None if seq_idx is None else F.pad(seq_idx, (left, right))  # the padding of x is zero in any sequence
    for i in range(k):
        term = wide[:, i : i + length] * weight[:, i]
        if index is not None and seq_idx is not None:
            same = index[:, i : i + length] == seq_idx[:, extra:]
            term = torch.where(same[..., None], term, torch.zeros_like(term))
        y = y + term
    return (F.silu(y) if silu else y).to(x.dtype)


class _Pieces(torch.autograd.Function):
    """The convolution of a CPU; its second derivatives are those of the shifted sums."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return convolved(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.left, ctx.length, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            tensors = [x, weight] if bias is None else [x, weight, bias]

            def written_out(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
                return _shifted(x, weight, bias, None, ctx.left, ctx.length, ctx.silu)

            found = torch.func.vjp(written_out, *tensors)[1](dy)
            return *found, *(None,) * (6 - len(found))
        dx, dweight, dbias = conv_gradients(x, weight, bias, ctx.left, ctx.length, ctx.silu, dy)
        return dx, dweight, None if bias is None else dbias, None, None, None


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, left: int, length: int, silu: bool) -> Tensor:
    """`causal_conv1d_chunked` by oneDNN, without a gradient."""
    y = x.new_empty(x.shape[0], length, x.shape[2])
    filters = filters_of(weight)
    for rows, span, _, wide in _pieces(x, weight, left, length):
        pre = convolve(wide, filters, bias)
        y[rows, span] = F.silu(pre, inplace=True) if silu else pre
    return y


def conv_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: int, length: int, silu: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from that of `convolved`."""
    k = weight.shape[1]
    filters, mirrored = filters_of(weight), filters_of(weight.flip(1))
    dx = x.new_zeros(x.shape, dtype=weight.dtype)
    dweight, dbias = torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
    for rows, span, source, wide in _pieces(x, weight, left, length):
        dpre = dy[rows, span].to(weight.dtype)
        if silu:
            dpre = torch.ops.aten.silu_backward(dpre, convolve(wide, filters, bias))
        first = source.start - (span.start - left)
        reached = convolve(F.pad(dpre, (0, 0, k - 1, k - 1)), mirrored, None)
        dx[rows, source] += reached[:, first : first + source.stop - source.start]
        dfilters, dsum = filter_gradients(dpre.contiguous(), wide, filters)
        dweight += dfilters
        dbias += dsum
    return dx.to(x.dtype), dweight, dbias


def _pieces(x: Tensor, weight: Tensor, left: int, length: int) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Rows and outputs of each piece, the inputs that it sees, and those with zeros where there are none."""
    batch, positions, channels = x.shape
    k = weight.shape[1]
    count = max(k, _PIECE // channels)
    together = max(1, _PIECE // (channels * min(count, length)))
    for row in range(0, batch, together):
        rows = slice(row, min(batch, row + together))
        for start in range(0, length, count):
            stop = min(length, start + count)
            first, last = start - left, stop - left + k - 1
            source = slice(max(0, first), min(positions, last))
            part = x[rows, source].to(weight.dtype)
            wide = F.pad(part, (0, 0, source.start - first, last - source.stop))
            yield rows, slice(start, stop), source, wide.contiguous()


def filters_of(weight: Tensor) -> Tensor:
    """(c, k) as filters over the rows of images one pixel wide, (c, 1, k, 1)."""
    return weight[:, None, :, None].contiguous(memory_format=torch.channels_last)


def images(x: Tensor) -> Tensor:
    """(b, l, c) as images (b, c, l, 1), channels last."""
    return x.unsqueeze(2).permute(0, 3, 1, 2)


def convolve(wide: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    """What filters give on (b, l + k - 1, c), (b, l, c)."""
    with torch.autocast("cpu", enabled=False):  # it would round the parameters
        y = F.conv2d(images(wide), filters, bias, groups=filters.shape[0])
    return y[..., 0].mT.contiguous()


def filter_gradients(dy: Tensor, wide: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight (c, k) and bias (c,) from those of `convolve`, (b, l, c)."""
    channels = filters.shape[0]
    options = [channels], [1, 1], [0, 0], [1, 1], False, [0, 0], channels, [False, True, True]
    _, dfilters, dbias = torch.ops.aten.convolution_backward(images(dy), images(wide), filters, *options)
    return dfilters.flatten(1), dbias
