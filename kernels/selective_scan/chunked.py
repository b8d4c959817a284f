"""The selective scan in plain PyTorch, with memory that does not grow with l times d times n.

Rows and channels are cut into blocks and time into tiles. States of a tile are formed, used and dropped; only every
32nd is kept for the backward pass, which walks the tiles from the last to the first and forms the states again. On a
CPU wide rows go one position after another (`stepwise.py`). Else, in a tile, chunks of q positions advance together
from zero, then the chunks' end states are handed on one after another (s_t the state from zero, sums over the positions
since the chunk's start):

    h_t = s_t + exp(A sum dt) h_chunk

Decays are kept as expm1(dt A), so slow ones lose nothing to rounding near 1. With G_t the gradient that reaches h_t:

    G_t = conj(C_t) dy_t + conj(e^{dt_{t+1} A}) G_{t+1},    X_t = G_t conj(e^{dt_t A} h_{t-1})
    dC = sum_d dy conj(h),  dB = sum_d dt u G,  du = dt Re sum_n conj(B) G,  dA = sum_t dt X,
    ddt = u Re sum_n conj(B) G + Re sum_n conj(A) X
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..linear_scan.chunked import linear_scan_chunked
from ..transforms import apply, operator
from .stepwise import Decay, Steps, backward, forward, lives_long, piece_of

# Every 32nd state is saved for the backward pass; tiles are multiples of it.
_SAVED = 32
# Numbers of a position (rows x channels x states) in one block. On a CPU a tile then fits the second-level cache;
# elsewhere a buffer of a tile has 256 MB.
_CPU_NUMBERS, _DEVICE_NUMBERS = 8192, 1 << 20
# Numbers of a position from which a CPU goes position by position, and at most in a block there: a few buffers of a
# position must fit the second-level cache.
_STEPWISE, _STEPWISE_BLOCK = 4096, 1 << 16
# At most in a block going backward, which holds more for each.
_STEPWISE_BACKWARD = 1 << 15


def selective_scan_chunked(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See `selective_scan_reference`."""
    if A.is_complex():
        C = 2 * C
    keep = None if seq_idx is None else _linked(seq_idx).to(A.dtype).real[..., None]
    y, final, _ = apply(_Scan, u, dt, A, B, C, initial_state, keep)
    if window is not None and window > 1:
        segments = _linked(_segments(u, seq_idx, window).flip(1)).to(A.dtype).real[..., None]
        later = apply(_Scan, u.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), None, segments)[0].flip(1)
        once = (B.to(A.dtype) * C.to(A.dtype)).sum(-1).real  # (b, l, g): both scans have the position itself
        own = (dt.to(y.dtype) * u.to(y.dtype)).unflatten(2, (B.shape[2], -1)) * once[..., None]
        y = y + (later - own.flatten(2))
    if D is not None:
        y = torch.addcmul(y, D.to(y.dtype), u.to(y.dtype))
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype), final


def _linked(index: Tensor) -> Tensor:
    """Whether a position goes on with the state of the one before, (b, l); the first always does."""
    first = torch.arange(index.shape[1], device=index.device) == 0
    return (index == index.roll(1, 1)) | first


def _segments(u: Tensor, seq_idx: Tensor | None, window: int) -> Tensor:
    """A number for each segment of `window` positions, counted from the start of its sequence; differs from the next
    one's, (b, l)."""
    position = torch.arange(u.shape[1], device=u.device).expand(u.shape[0], -1)
    if seq_idx is None:
        return position // window
    starts = torch.where(_linked(seq_idx), torch.zeros_like(position), position).cummax(1).values
    return starts + (position - starts) // window * window


def _in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which would round the operands of products."""

    @functools.wraps(function)
    def wrapped(u: Tensor, *further: Any) -> Any:
        with torch.autocast(u.device.type, enabled=False):
            return function(u, *further)

    return wrapped


@operator("selective_scan_chunked_fwd")
@_in_full_precision
def _forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output Re(sum_n C h), (b, l, d); the final state; every 32nd state and the final one, (l / 32 + 1, b, d, n).

    `keep` is 0 where the state starts anew, else 1: (b, l, 1) or (b, l, g).
    """
    groups = B.shape[2]
    y, final, saved = _empty_outputs(u, A)
    inputs = _Inputs(u, dt, A, B, C, keep)
    out, out_final, out_saved = _by_group(y, groups), _states(final, groups), _states(saved, groups)
    first = None if initial_state is None else _states(initial_state, groups)
    for rows, columns in inputs.blocks():
        carry = torch.zeros_like(out_final[rows, ..., columns], memory_format=torch.contiguous_format)
        if first is not None:
            carry.copy_(first[rows, ..., columns])
        for span, steps, decay in inputs.steps(rows, columns):
            out_saved[span.start // _SAVED, rows, ..., columns] = carry
            out[span, rows, ..., columns] = forward(steps, decay, carry)
        for tile in inputs.tiles(rows, columns):
            gates, h = tile.gates()[:-1], tile.inputs()[1:]
            tile.scan(gates, h, carry)
            here = slice(tile.start // _SAVED, tile.start // _SAVED + math.ceil(tile.size / _SAVED))
            kept = out_saved[here, rows, ..., columns]
            kept[0] = carry
            kept[1:] = h[_SAVED - 1 : tile.size - 1 : _SAVED]
            out[tile.span, rows, ..., columns] = (tile.C[..., None, :] @ h).squeeze(-2)[: tile.size].real
            carry.copy_(h[-1])
        out_final[rows, ..., columns] = carry
    saved[-1] = final
    return y, final, saved


@operator("selective_scan_chunked_bwd")
@_in_full_precision
def _backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    keep: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C and the initial state."""
    groups = B.shape[2]
    du, ddt, dA, _, _, dinitial = _empty_gradients(u, dt, A, B, C, dfinal)
    dA.zero_()
    dB, dC = (x.new_zeros(x.shape, dtype=A.dtype) for x in (B, C))
    inputs = _Inputs(u, dt, A, B, C, keep, backward=True)
    from_y, from_final, kept = _by_group(dy, groups), _states(dfinal, groups), _states(saved, groups)
    out_u, out_dt, out_A = _by_group(du, groups), _by_group(ddt, groups), _states(dA, groups)
    out_initial = _states(dinitial, groups)
    for rows, columns in inputs.blocks():
        carry = from_final[rows, ..., columns].clone(memory_format=torch.contiguous_format)
        dA_rows = torch.zeros_like(carry)
        for span, steps, decay in inputs.steps(rows, columns, backward=True):
            before = kept[span.start // _SAVED, rows, ..., columns].contiguous()
            dy_tile = inputs.cut(from_y, span, rows, columns, A.dtype)
            du_tile, ddt_tile, dB_tile, dC_tile = backward(steps, decay, before, dy_tile, carry, dA_rows)
            out_u[span, rows, ..., columns], out_dt[span, rows, ..., columns] = du_tile, ddt_tile
            dB.transpose(0, 1)[span, rows] += dB_tile
            dC.transpose(0, 1)[span, rows] += dC_tile
        out_A[..., columns] += dA_rows.sum(0)
        for tile in inputs.tiles(rows, columns, backward=True):
            gates, h = tile.gates(), tile.inputs()
            h[0] = kept[tile.start // _SAVED, rows, ..., columns]
            tile.scan(gates[:-1], h[1:], h[0])
            h, gates = h.conj().resolve_conj(), gates.conj().resolve_conj()
            dy_tile = tile.read(from_y, columns, A.dtype)
            grads = torch.mul(tile.C.conj()[..., None], dy_tile[..., None, :], out=tile.buffer(2)[1:])
            dC.transpose(0, 1)[tile.span, rows] += (h[1:] @ dy_tile[..., None]).squeeze(-1)[: tile.size]
            tile.scan(gates[1:], grads, carry, reverse=True)
            dB.transpose(0, 1)[tile.span, rows] += (grads @ tile.weighted[..., None]).squeeze(-1)[: tile.size]
            dweighted = (tile.B.conj()[..., None, :] @ grads).squeeze(-2)[: tile.size].real
            torch.addcmul(grads[0], gates[0], grads[0], out=carry)
            products = gates[:-1].add_(1).mul_(h[:-1]).mul_(grads)
            direct = torch.mul(products, tile.A.conj(), out=grads).sum(-2)[: tile.size].real
            out_dt[tile.span, rows, ..., columns] = torch.addcmul(direct, tile.u[: tile.size], dweighted)
            out_u[tile.span, rows, ..., columns] = tile.dt[: tile.size] * dweighted
            out_A[..., columns] += products.mul_(tile.dt[..., None, :]).sum((0, 1))
        out_initial[rows, ..., columns] = carry
    return du, ddt, dA, _narrow(dB, B.dtype), _narrow(dC, C.dtype), dinitial


class _Inputs:
    """Inputs with time in front and channels by group, cut into blocks and tiles."""

    def __init__(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: Tensor | None, backward: bool = False
    ) -> None:
        self.groups, self.states = B.shape[2:]
        self.u, self.dt = _by_group(u, self.groups), _by_group(dt, self.groups)  # (l, b, g, d)
        self.A = _states(A, self.groups)  # (g, n, d)
        self.B, self.C = B.transpose(0, 1), C.transpose(0, 1)  # (l, b, g, n)
        self.keep = None if keep is None else keep.transpose(0, 1)[..., None]
        self.buffers: dict[int, Tensor] = {}
        on_cpu = u.device.type == "cpu"
        length, batch, _, channels = self.u.shape
        per_channel = self.groups * self.states
        self.stepwise = on_cpu and batch * channels * per_channel >= _STEPWISE
        self.precise = self.stepwise and lives_long(self.dt, self.A)
        stepwise = min(_STEPWISE_BLOCK, _STEPWISE_BACKWARD) if backward else _STEPWISE_BLOCK
        numbers = stepwise if self.stepwise else _CPU_NUMBERS if on_cpu else _DEVICE_NUMBERS
        self.columns = _evenly(channels, numbers // per_channel)
        self.rows = _evenly(batch, numbers // (per_channel * self.columns))
        tiles = 1 if self.stepwise else 2 * max(1, numbers // (per_channel * self.columns * self.rows))
        self.length = min(length, tiles * _SAVED)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rows and channels of a group that are done together."""
        _, batch, _, channels = self.u.shape
        for row, column in itertools.product(range(0, batch, self.rows), range(0, channels, self.columns)):
            yield slice(row, row + self.rows), slice(column, column + self.columns)

    def starts(self, backward: bool) -> range:
        starts = range(0, self.u.shape[0], self.length)
        return starts[::-1] if backward else starts

    def tiles(self, rows: slice, columns: slice, backward: bool = False) -> Iterator[_Tile]:
        """The tiles of a block, where chunks advance together."""
        if not self.stepwise:
            for start in self.starts(backward):
                yield _Tile(self, start, rows, columns)

    def steps(self, rows: slice, columns: slice, backward: bool = False) -> Iterator[tuple[slice, Steps, Decay]]:
        """The tiles of a block, where one position follows another, with their places in time and their decays."""
        if not self.stepwise:
            return
        A, batch = self.A[..., columns].contiguous(), self.u[0, rows].shape[0]
        decay = Decay(
            A, self.precise, batch, self.length if backward else min(self.length, piece_of(batch * A.numel()))
        )
        everything, real, dtype = slice(None), self.A.real.dtype, self.A.dtype
        for start in self.starts(backward):
            span = slice(start, min(start + self.length, self.u.shape[0]))
            u, dt = (self.cut(x, span, rows, columns, real, copy=backward) for x in (self.u, self.dt))
            B, C = (self.cut(x, span, rows, everything, dtype) for x in (self.B, self.C))
            keep = None if self.keep is None else self.cut(self.keep, span, rows, everything, real)
            yield span, Steps(u, dt, B, C, keep), decay

    def cut(self, x: Tensor, span: slice, rows: slice, columns: slice, dtype: torch.dtype, copy: bool = True) -> Tensor:
        """A part of (l, b, g, ...), contiguous; without `copy` at least in its last dimension."""
        part = x[span, rows, :, columns].to(dtype)
        return part if not copy and part.stride(-1) == 1 else part.contiguous()


class _Tile:
    """One block during one stretch of time, padded to whole chunks with steps of zero length, which change nothing."""

    def __init__(self, inputs: _Inputs, start: int, rows: slice, columns: slice) -> None:
        self.start, self.rows, self.inputs_of = start, rows, inputs
        self.size = min(inputs.length, inputs.u.shape[0] - start)
        self.span = slice(start, start + self.size)
        # A power of two near the square root: as many steps inside chunks as from chunk to chunk.
        self.chunk = min(2 * _SAVED, 1 << (math.isqrt(self.size).bit_length() - 1))
        self.padding = -self.size % self.chunk
        everything, real, dtype = slice(None), inputs.A.real.dtype, inputs.A.dtype
        self.A = inputs.A[..., columns].contiguous()
        self.u, self.dt = self.read(inputs.u, columns, real), self.read(inputs.dt, columns, real)
        self.B, self.C = self.read(inputs.B, everything, dtype), self.read(inputs.C, everything, dtype)
        self.keep = None if inputs.keep is None else self.read(inputs.keep, everything, real, fill=1.0)
        self.weighted = (self.dt * self.u).to(dtype)

    def read(self, x: Tensor, columns: slice, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """This tile of (l, b, g, ...)."""
        return F.pad(x[self.span, self.rows, :, columns].to(dtype), (0, 0, 0, 0, 0, 0, 0, self.padding), value=fill)

    def buffer(self, number: int) -> Tensor:
        """One of the buffers of all tiles in turn, (1 + time, rows, g, n, d)."""
        shape = (1 + self.size + self.padding, self.dt.shape[1], *self.A.shape)
        flat = self.inputs_of.buffers.get(number)
        if flat is None or flat.numel() < math.prod(shape):
            flat = self.inputs_of.buffers[number] = self.A.new_empty(math.prod(shape))
        return flat[: math.prod(shape)].view(shape)

    def gates(self) -> Tensor:
        """Decay - 1, and 0 after the last position."""
        gates = self.buffer(0)
        gates[-1] = 0
        _gates(self.dt, self.keep, self.A, gates[:-1])
        return gates

    def inputs(self) -> Tensor:
        """dt u B, with room for the state before the first position."""
        inputs = self.buffer(1)
        torch.mul(self.weighted[..., None, :], self.B[..., None], out=inputs[1:])
        return inputs

    def scan(self, gates: Tensor, x: Tensor, initial: Tensor, reverse: bool = False) -> None:
        """x_t + (1 + gate_t) of the one before, in place; `reverse`: of the one after, with the gates of its step."""
        chunks = x.shape[0] // self.chunk
        order = range(self.chunk - 1, -1, -1) if reverse else range(self.chunk)
        gates, x = gates.unflatten(0, (chunks, self.chunk)), x.unflatten(0, (chunks, self.chunk))
        for last, k in itertools.pairwise(order):
            x[:, k].add_(torch.addcmul(x[:, last], gates[:, k], x[:, last]))
        products = self.products(chunks, reverse)
        before = initial
        for chunk in range(chunks - 1, -1, -1) if reverse else range(chunks):
            x[chunk].add_(torch.addcmul(before, products[chunk], before))
            before = x[chunk, order[-1]]

    def products(self, chunks: int, reverse: bool) -> Tensor:
        """Product of the decays since the chunk's start (`reverse`: its end), minus 1; (chunks, q, rows, g, n, d)."""

        def running(x: Tensor, fill: float, accumulate: Callable[..., Tensor]) -> Tensor:
            if reverse:
                x = F.pad(x[1:], (0, 0, 0, 0, 0, 0, 0, 1), value=fill)
            x = x.unflatten(0, (chunks, self.chunk))
            return accumulate(x.flip(1), 1).flip(1) if reverse else accumulate(x, 1)

        keep = None if self.keep is None else running(self.keep, 1.0, torch.cumprod)
        total = running(self.dt, 0.0, torch.cumsum)
        products = self.buffer(3)[1:].unflatten(0, (chunks, self.chunk))
        _gates(total, keep, self.A.conj().resolve_conj() if reverse else self.A, products)
        return products


def _gates(dt: Tensor, keep: Tensor | None, A: Tensor, out: Tensor) -> None:
    """expm1(dt A) for (..., g, d), -1 where nothing is kept, into (..., g, n, d)."""
    torch.mul(dt[..., None, :], A, out=out)
    torch.expm1(out, out=out)
    if keep is not None:
        out.masked_fill_(keep[..., None] == 0, -1)


def _evenly(count: int, most: int) -> int:
    """Size of the fewest parts of nearly equal size, none larger than `most`."""
    return -(-count // -(-count // max(1, most)))


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(b, l, d) as a view (l, b, g, d)."""
    return x.unflatten(2, (groups, -1)).transpose(0, 1)


def _states(x: Tensor, groups: int) -> Tensor:
    """(..., d, n) as a view (..., g, n, d)."""
    return x.unflatten(-2, (groups, -1)).mT


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x if dtype.is_complex else x.real).to(dtype)


def _empty_outputs(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    # With the final state there are two or more: torch.export would build a size of 1 in.
    saved = A.new_empty((length + _SAVED - 1) // _SAVED + 1, batch, channels, A.shape[1])
    return A.real.new_empty(batch, length, channels), A.new_empty(batch, channels, A.shape[1]), saved


def _empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


@torch.library.register_fake("ssm::selective_scan_chunked_fwd")
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(u, A)


@torch.library.register_fake("ssm::selective_scan_chunked_bwd")
def _(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    keep: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, ...]:
    return _empty_gradients(u, dt, A, B, C, dfinal)


# A mapped dimension becomes more channels in more groups: each instance then has its own A and its own gradient of it.
def _widen(x: Tensor | None, mapped: int | None, count: int, dim: int) -> Tensor | None:
    """Merge a mapped dimension into dimension `dim` of `x`."""
    if x is None:
        return None
    x = x.expand(count, *x.shape) if mapped is None else x.movedim(mapped, 0)
    return x.movedim(0, dim).flatten(dim, dim + 1)


def _widen_keep(keep: Tensor | None, mapped: int | None, count: int, groups: int) -> Tensor | None:
    if keep is None or mapped is None:
        return keep if keep is None or keep.shape[2] == 1 else _widen(keep, None, count, 2)
    keep = keep.movedim(mapped, 0)
    return _widen(keep.expand(*keep.shape[:-1], groups), 0, count, 2)


@torch.library.register_vmap("ssm::selective_scan_chunked_fwd")
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    *arguments: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    *scanned, keep = arguments
    count, (*dims, keep_dim) = info.batch_size, in_dims
    wide = [_widen(x, mapped, count, dim) for x, mapped, dim in zip(scanned, dims, (2, 2, 0, 2, 2, 1))]
    outputs = _forward(*wide, _widen_keep(keep, keep_dim, count, wide[3].shape[2] // count))  # type: ignore[union-attr]
    return tuple(x.unflatten(dim, (count, -1)) for x, dim in zip(outputs, (2, 1, 2))), (2, 1, 2)


@torch.library.register_vmap("ssm::selective_scan_chunked_bwd")
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    *arguments: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    count, dims = info.batch_size, (2, 2, 0, 2, 2, None, 2, 2, 1)
    groups = arguments[3].shape[2 if in_dims[3] is None or in_dims[3] > 2 else 3]
    wide = [
        _widen_keep(x, mapped, count, groups) if dim is None else _widen(x, mapped, count, dim)
        for x, mapped, dim in zip(arguments, in_dims, dims)
    ]
    into = (2, 2, 0, 2, 2, 1)
    return tuple(x.unflatten(dim, (count, -1)) for x, dim in zip(_backward(*wide), into)), into


class _Scan(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(u, dt, A, B, C, initial_state, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs, output[2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, initial_state, keep, saved = ctx.saved_tensors
        *gradients, dinitial = apply(_Gradient, *inputs, initial_state, keep, saved, dy, dfinal)
        return *gradients, None if initial_state is None else dinitial, None


class _Gradient(torch.autograd.Function):
    """The backward op; its own gradient is that of the states written out, which needs their memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        initial_state: Tensor | None,
        keep: Tensor | None,
        saved: Tensor,
        dy: Tensor,
        dfinal: Tensor,
    ) -> tuple[Tensor, ...]:
        return _backward(u, dt, A, B, C, keep, saved, dy, dfinal)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *inputs, _, dy, dfinal = inputs  # type: ignore[assignment]
        ctx.save_for_backward(*inputs, dy, dfinal)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, initial_state, keep, dy, dfinal = ctx.saved_tensors
        first = torch.zeros_like(dfinal) if initial_state is None else initial_state

        def gradient(*tensors: Tensor) -> Any:
            *scanned, dy, dfinal = tensors
            return torch.func.vjp(functools.partial(_written_out, keep), *scanned)[1]((dy, dfinal))

        *found, dfirst, ddy, ddfinal = torch.func.vjp(gradient, *inputs, first, dy, dfinal)[1](cotangents)
        return *found, None if initial_state is None else dfirst, None, None, ddy, ddfinal


def _written_out(
    keep: Tensor | None, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same with all states in memory, (b, l, d, n), differentiable any number of times."""
    groups, dtype = B.shape[2], A.dtype
    wide = dt.to(A.real.dtype).unflatten(2, (groups, -1))[..., None]  # (b, l, g, d, 1)
    decay = torch.exp(wide * A.unflatten(0, (groups, -1)))
    if keep is not None:
        decay = decay * keep[..., None, None]
    inputs = wide * u.to(A.real.dtype).unflatten(2, (groups, -1))[..., None] * B.to(dtype)[..., None, :]
    states, final = linear_scan_chunked(decay.flatten(2), inputs.flatten(2), initial_state.flatten(1), False, dtype)
    y = (states.view(decay.shape) * C.to(dtype)[..., None, :]).sum(-1).flatten(2)
    return y.real if y.is_complex() else y, final.view(initial_state.shape)
