"""The convolution by real FFTs, in blocks of channels that bound the workspace.

Packed rows have no common Toeplitz matrix. They are cut in two again and again: only the one sequence that lies on the
middle of a block has terms that pass from one half to the other, so these terms are a convolution of the half masked to
that sequence, and all blocks of a size go through one FFT:

    y_t += [idx_t = idx_mid] sum_s K(t - s) [idx_s = idx_mid] x_s,      t and s in different halves

Lags below 16 are done directly and left out there, which ends the cutting at blocks of 32. With lead' = k - 1 - lead:

    dx = convolve(dy, flip(taps), lead'),     dtaps_i = sum_{b,t} dy_t x_{t-i+lead} = correlate(dy, x)

Each of the two is a custom op, opaque to torch.compile and torch.export, whose gradient is made of calls to both.
Inside of them spectra are conjugated in memory: compiled code runs them below the layer that resolves lazy conjugation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..transforms import apply, operator

# Numbers in one padded block of rows and channels: 32 MB in float32, a few times that with its spectra.
_BLOCK_NUMBERS = 1 << 23
# Lags below this are sums of shifted products.
_NEAR = 16


def fft_conv_chunked(x: Tensor, taps: Tensor, lead: int, seq_idx: Tensor | None) -> Tensor:
    """See `fft_conv_reference`."""
    y: Tensor = apply(_Convolve, x, taps, lead, seq_idx)
    return y


@operator("fft_conv_convolve")
def _convolve(x: Tensor, taps: Tensor, lead: int, seq_idx: Tensor | None) -> Tensor:
    taps, lead = _within(taps, lead, x.shape[1])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for block in _channel_blocks(x):
        part, weights = x[..., block], taps[block]
        if seq_idx is None and weights.shape[1] > _NEAR:
            y[..., block] = _convolve_rows(part, weights, lead)
        else:
            y[..., block] = _convolve_near(part, weights, lead, seq_idx)
            if seq_idx is not None:
                _add_far(y[..., block], part, weights, lead, seq_idx)
    return y


@operator("fft_conv_correlate")
def _correlate(dy: Tensor, x: Tensor, k: int, lead: int, seq_idx: Tensor | None) -> Tensor:
    length = x.shape[1]
    inner_lead, after = min(lead, length - 1), min(k - 1 - lead, length - 1)
    size, start = inner_lead + 1 + after, lead - inner_lead
    dtaps = x.new_zeros(x.shape[2], k)
    for block in _channel_blocks(x):
        found, part, gradient = dtaps[block, start : start + size], x[..., block], dy[..., block]
        if seq_idx is None and size > _NEAR:
            found.copy_(_correlate_rows(gradient, part, size, inner_lead))
        else:
            _correlate_near(found, gradient, part, inner_lead, seq_idx)
            if seq_idx is not None:
                _correlate_far(found, gradient, part, inner_lead, seq_idx)
    return dtaps


def _within(taps: Tensor, lead: int, length: int) -> tuple[Tensor, int]:
    """The taps that reach anything in rows of this length."""
    first, end = max(0, lead - length + 1), min(taps.shape[1], lead + length)
    return taps[:, first:end], lead - first


def _channel_blocks(x: Tensor) -> Iterator[slice]:
    batch, length, channels = x.shape
    size = max(1, _BLOCK_NUMBERS // (2 * batch * length))
    return (slice(start, min(start + size, channels)) for start in range(0, channels, size))


def _fast_length(least: int) -> int:
    """The smallest even size at least `least` with a fast FFT."""
    return min(odd << max(1, (-(-least // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15))


def _convolve_rows(x: Tensor, taps: Tensor, lead: int) -> Tensor:
    length, k = x.shape[1], taps.shape[1]
    n = _fast_length(length + max(lead, k - 1 - lead))
    circle = F.pad(taps, (0, n - k)).roll(-lead, 1)
    spectrum = torch.fft.rfft(x.mT, n) * torch.fft.rfft(circle)
    return torch.fft.irfft(spectrum, n)[..., :length].mT


def _correlate_rows(dy: Tensor, x: Tensor, k: int, lead: int) -> Tensor:
    n = _fast_length(x.shape[1] + max(lead, k - 1 - lead))
    spectrum = (torch.fft.rfft(dy.mT, n) * torch.fft.rfft(x.mT, n).conj_physical()).sum(0)
    return torch.fft.irfft(spectrum, n).roll(lead, 1)[:, :k]


def _near_lags(
    k: int, lead: int, length: int, seq_idx: Tensor | None
) -> Iterator[tuple[int, slice, slice, Tensor | None]]:
    """Tap, positions t, positions s = t - lag and whether they are of one sequence, for the lags done directly."""
    for i in range(max(0, lead - _NEAR + 1), min(k, lead + _NEAR)):
        lag = i - lead
        at, of = slice(max(0, lag), length + min(0, lag)), slice(max(0, -lag), length - max(0, lag))
        yield i, at, of, None if seq_idx is None else (seq_idx[:, at] == seq_idx[:, of])[..., None]


def _convolve_near(x: Tensor, taps: Tensor, lead: int, seq_idx: Tensor | None) -> Tensor:
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for i, at, of, same in _near_lags(taps.shape[1], lead, x.shape[1], seq_idx):
        reached = x[:, of] if same is None else torch.where(same, x[:, of], 0)
        y[:, at].addcmul_(reached, taps[:, i])
    return y


def _correlate_near(dtaps: Tensor, dy: Tensor, x: Tensor, lead: int, seq_idx: Tensor | None) -> None:
    for i, at, of, same in _near_lags(dtaps.shape[1], lead, x.shape[1], seq_idx):
        product = dy[:, at] * x[:, of]
        dtaps[:, i] = (product if same is None else torch.where(same, product, 0)).sum((0, 1))


def _levels(length: int, seq_idx: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Half sizes, and which positions (b, blocks, 2 half, 1) belong to the sequence on the middle of their block."""
    half = _NEAR
    while half < length:
        index = F.pad(seq_idx, (0, -length % (2 * half))).unflatten(1, (-1, 2 * half))
        yield half, (index == index[..., half - 1 : half])[..., None]
        half *= 2


def _halves(x: Tensor, half: int, member: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right halves of all blocks, (b, blocks, c, half), zero outside of the middle's sequence."""
    blocks = F.pad(x, (0, 0, 0, -x.shape[1] % (2 * half))).unflatten(1, (-1, 2 * half))
    left, right = torch.where(member, blocks, 0).mT.split(half, -1)
    return left, right


def _add_far(y: Tensor, x: Tensor, taps: Tensor, lead: int, seq_idx: Tensor) -> None:
    length = x.shape[1]
    behind, ahead = taps[:, lead:].clone(), taps[:, :lead].flip(1)  # by lag 0, 1, ... and -1, -2, ...
    behind[:, :_NEAR], ahead[:, : _NEAR - 1] = 0, 0
    for half, member in _levels(length, seq_idx):
        left, right = _halves(x, half, member)
        n = 2 * half
        added = torch.zeros(*left.shape[:2], n, left.shape[2], dtype=x.dtype, device=x.device)
        if behind.shape[1] > _NEAR:
            circle = F.pad(behind, (0, n - behind.shape[1]))
            across = torch.fft.irfft(torch.fft.rfft(left, n) * torch.fft.rfft(circle), n)
            added[:, :, half:] = across[..., half:].mT
        if ahead.shape[1] >= _NEAR:
            # Lag -m at n - m of the circle: what reaches the left half comes out in the right one.
            circle = F.pad(F.pad(ahead, (0, n - 1 - ahead.shape[1])).flip(1), (1, 0))
            across = torch.fft.irfft(torch.fft.rfft(right, n) * torch.fft.rfft(circle), n)
            added[:, :, :half] = across[..., half:].mT
        y += torch.where(member, added, 0).flatten(1, 2)[:, :length]


def _correlate_far(dtaps: Tensor, dy: Tensor, x: Tensor, lead: int, seq_idx: Tensor) -> None:
    behind, ahead = dtaps[:, lead:], dtaps[:, :lead]
    for half, member in _levels(x.shape[1], seq_idx):
        left, right = _halves(x, half, member)
        dleft, dright = _halves(dy, half, member)
        n = 2 * half

        def across(gradient: Tensor, values: Tensor, half: int = half, n: int = n) -> Tensor:
            late = torch.fft.rfft(F.pad(gradient, (half, 0)), n)
            return torch.fft.irfft((late * torch.fft.rfft(values, n).conj_physical()).sum((0, 1)), n)

        if behind.shape[1] > _NEAR:
            end = min(n, behind.shape[1])
            behind[:, _NEAR:end] += across(dright, left)[:, _NEAR:end]
        if ahead.shape[1] >= _NEAR:
            end = min(n, ahead.shape[1] + 1)
            ahead[:, lead - end + 1 : lead - _NEAR + 1] += across(dleft, right)[:, n - end + 1 : n - _NEAR + 1]


@torch.library.register_fake("ssm::fft_conv_convolve")
def _(x: Tensor, taps: Tensor, lead: int, seq_idx: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("ssm::fft_conv_correlate")
def _(dy: Tensor, x: Tensor, k: int, lead: int, seq_idx: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[2], k)


@torch.library.register_vmap("ssm::fft_conv_convolve")
def _(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, taps: Tensor, lead: int, seq_idx: Tensor | None
) -> tuple[Tensor, int]:
    count = info.batch_size
    x, taps = _mapped(x, in_dims[0], count), _mapped(taps, in_dims[1], count)
    if seq_idx is not None and in_dims[3] is not None:
        each = zip(x, taps, seq_idx.movedim(in_dims[3], 0), strict=True)
        return torch.stack([_convolve(one, weights, lead, index) for one, weights, index in each]), 0
    return _convolve(_beside(x), taps.flatten(0, 1), lead, seq_idx).unflatten(2, (count, -1)), 2


@torch.library.register_vmap("ssm::fft_conv_correlate")
def _(
    info: Any, in_dims: tuple[Any, ...], dy: Tensor, x: Tensor, k: int, lead: int, seq_idx: Tensor | None
) -> tuple[Tensor, int]:
    count = info.batch_size
    dy, x = _mapped(dy, in_dims[0], count), _mapped(x, in_dims[1], count)
    if seq_idx is not None and in_dims[4] is not None:
        each = zip(dy, x, seq_idx.movedim(in_dims[4], 0), strict=True)
        return torch.stack([_correlate(gradient, one, k, lead, index) for gradient, one, index in each]), 0
    return _correlate(_beside(dy), _beside(x), k, lead, seq_idx).unflatten(0, (count, -1)), 0


def _mapped(x: Tensor, dimension: int | None, count: int) -> Tensor:
    return x.expand(count, *x.shape) if dimension is None else x.movedim(dimension, 0)


def _beside(x: Tensor) -> Tensor:
    """Rows of a mapped dimension as further channels: (m, b, l, c) -> (b, l, m c)."""
    return x.movedim(0, 2).flatten(2, 3)


class _Convolve(torch.autograd.Function):
    """The convolution with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, taps: Tensor, lead: int, seq_idx: Tensor | None) -> Tensor:
        y: Tensor = _convolve(x, taps, lead, seq_idx)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, taps, ctx.lead, seq_idx = inputs
        ctx.save_for_backward(x, taps, seq_idx)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, taps, seq_idx = ctx.saved_tensors
        k, dx, dtaps = taps.shape[1], None, None
        if ctx.needs_input_grad[0]:
            dx = apply(_Convolve, dy, taps.flip(1), k - 1 - ctx.lead, seq_idx)
        if ctx.needs_input_grad[1]:
            dtaps = apply(_Correlate, dy, x, k, ctx.lead, seq_idx)
        return dx, dtaps, None, None


class _Correlate(torch.autograd.Function):
    """The gradient of the taps, with its own gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, x: Tensor, k: int, lead: int, seq_idx: Tensor | None) -> Tensor:
        dtaps: Tensor = _correlate(dy, x, k, lead, seq_idx)
        return dtaps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, x, ctx.k, ctx.lead, seq_idx = inputs
        ctx.save_for_backward(dy, x, seq_idx)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        dy, x, seq_idx = ctx.saved_tensors
        ddy = apply(_Convolve, x, g, ctx.lead, seq_idx)
        dx = apply(_Convolve, dy, g.flip(1), ctx.k - 1 - ctx.lead, seq_idx)
        return ddy, dx, None, None, None
