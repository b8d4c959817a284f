"""`cross_scan` in Triton: the four orders are strides, nothing is rearranged and nothing copied for an order.

A program has a block of channels of one grid and one order, and walks the cells of its order. It leaves y of its order
in the dtype of x, and one sum adds the four.

With more than a few states a lane holds K neighbouring ones of a channel and SUB lanes all n. Every 64th state is kept.
The backward pass walks these stretches from the last to the first: it leaves the state before each TIME positions in a
scratch buffer, forms those in between again in registers and goes back over them. With a few states a channel has one
lane for each of SEG segments instead, see triton_short.py; there dx may be added up order after order. Sums over
channels leave a program as partial sums that are added in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import FirstDerivative, apply, call, operator
from ..triton_utils import INTERPRETED, multiprocessors, on_device
from .triton_kernels import _cross_scan_bwd_kernel, _cross_scan_fwd_kernel
from .triton_short import _cross_scan_short_bwd_kernel, _cross_scan_short_fwd_kernel

_SHORT = 4  # states of a channel up to which its lanes have segments
_SAVED = 64  # positions from one state that is kept to the next, with more states


def cross_scan_triton(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """See `cross_scan`; A and D in the dtype of the states, which is that of the sum."""
    y, _ = apply(_Scan, x, dt, A, B, C, D, torch.is_grad_enabled())
    return y


@operator("cross_scan_triton_fwd")
@replayed
def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    """Output, and with `save` the states that the gradient starts from."""
    x, dt, A, B, C = (t.contiguous() for t in (x, dt, A, B, C))
    D = None if D is None else D.contiguous()
    tile = _tile(x, A, backward=False)
    kernel = _cross_scan_short_fwd_kernel if tile.short else _cross_scan_fwd_kernel
    y, saved = x.new_empty(4, *x.shape), _saved(x, A, save)
    with on_device(x):
        kernel[_grid(x, tile)](
            x, dt, A, B, C, A if D is None else D, y, saved, *x.shape[1:3], SAVE=save, **_options(x, A, D, tile)
        )
    return y.sum(0, dtype=A.dtype), saved


@operator("cross_scan_triton_bwd")
@replayed
def _backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, saved: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and D (empty without it)."""
    x, dt, A, B, C, dy = (t.contiguous() for t in (x, dt, A, B, C, dy))
    D = None if D is None else D.contiguous()
    batch, channels = x.shape[0], x.shape[3]
    tile = _tile(x, A, backward=True)
    options, grid = _options(x, A, D, tile), _grid(x, tile)
    dx, ddt = x.new_empty(tile.orders, *x.shape), torch.empty_like(dt)
    dmaps = A.new_empty(grid[0] // (tile.orders * batch), 2, *B.shape)
    dA, dD = A.new_empty(batch, 4, tile.SEG, *A.shape[1:]), A.new_empty(batch, 4, tile.SEG, channels)
    given = x, dt, A, B, C, A if D is None else D, dy, saved
    out = dx, ddt, dmaps, dA, dD, *x.shape[1:3]
    with on_device(x):
        if tile.short:
            for first in range(0, 4, tile.orders):
                _cross_scan_short_bwd_kernel[grid](*given, *out, first, tile.orders, int(first > 0), **options)
        else:
            scratch = A.new_empty(grid[0], tile.SAVED // tile.TIME * tile.K * tile.BD * tile.SUB)
            _cross_scan_bwd_kernel[grid](*given, scratch, *out, LEVELS=tile.TIME.bit_length() - 1, **options)
    dB, dC = dmaps.sum(0).to(B.dtype)
    found = dx[0] if tile.orders == 1 else dx.sum(0)  # summed in float32, rounded once
    return found, ddt, dA.sum((0, 2)), dB, dC.clone(), dD.sum((0, 2)) if D is not None else A.new_empty(0)


@torch.library.register_fake("ssm::cross_scan_triton_fwd")
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, save: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=A.dtype), _saved(x, A, save)


@torch.library.register_fake("ssm::cross_scan_triton_bwd")
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, saved: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    found = [t.new_empty(t.shape) for t in (x, dt, A, B, C)]
    return *found, A.new_empty(0 if D is None else D.shape)


class Tile(NamedTuple):
    """How states, channels and positions are cut; see the module."""

    short: bool  # whether the lanes of a channel have segments of the chunk, not parts of its states
    orders: int  # in one launch
    K: int
    SUB: int
    SEG: int
    BD: int
    TIME: int
    SAVED: int
    warps: int
    registers: int  # of a thread at most, 0: as many as it likes


def _tile(x: Tensor, A: Tensor, backward: bool) -> Tile:
    """What was fastest on an H100. Caps on registers let several programs share a multiprocessor."""
    n, channels = A.shape[2], x.shape[3]
    padded = triton.next_power_of_2(n)
    # The segments' offsets in one order of one grid are 32-bit integers.
    if padded > _SHORT or x.shape[1] * x.shape[2] * max(channels, _SHORT) >= 2**31:
        k = 1 if INTERPRETED else min(4, padded)
        sub = padded // k
        bd = min(max(128, sub) // sub, triton.next_power_of_2(channels))
        time = 4 if backward or INTERPRETED else 8
        return Tile(False, 4, k, sub, 1, bd, time, _SAVED, max(1, min(4, bd * sub // 32)), 128 if backward else 0)
    bd = min(32, triton.next_power_of_2(channels))
    if INTERPRETED:
        return Tile(True, 1 if backward else 4, padded, 1, 2, bd, 2, 4, 1, 0)
    saved, warps = 32 // padded, max(1, bd // 8)  # a chunk, both ways
    if not backward:
        return Tile(True, 4, padded, 1, 4, bd, 8 // padded, saved, warps, 0)
    # One order after the other, where one fills the device, adds to a single dx, which takes a quarter of the memory.
    orders = 1 if x.shape[0] * triton.cdiv(channels, bd) >= 2 * multiprocessors(x.device) else 4
    return Tile(True, orders, padded, 1, 8, bd, 4 // padded, saved, warps, 168)


def _options(x: Tensor, A: Tensor, D: Tensor | None, tile: Tile) -> dict[str, Any]:
    own: dict[str, Any] = {"SEG": tile.SEG} if tile.short else {"SUB": tile.SUB}
    options: dict[str, Any] = own | {
        "CHANNELS": x.shape[3], "N": A.shape[2], "K": tile.K, "BD": tile.BD, "TIME": tile.TIME, "SAVED": tile.SAVED,
        "HAS_D": D is not None, "PRECISE": x.element_size() >= 4,
        "ACC": tl.float64 if A.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    if INTERPRETED:
        return options
    cap = {"maxnreg": tile.registers, "num_stages": 1} if tile.registers else {}
    return options | {"num_warps": tile.warps} | cap


def _grid(x: Tensor, tile: Tile) -> tuple[int]:
    return (x.shape[0] * tile.orders * triton.cdiv(x.shape[3], tile.BD),)


def _saved(x: Tensor, A: Tensor, save: bool) -> Tensor:
    tile = _tile(x, A, backward=False)
    stretches = triton.cdiv(x.shape[1] * x.shape[2], tile.SAVED) if save else 0
    channels = x.shape[3] if tile.short else triton.cdiv(x.shape[3], tile.BD) * tile.BD
    return A.new_empty(x.shape[0] * 4 * stretches * channels * tile.SUB * tile.K)


class _Scan(torch.autograd.Function):
    """The forward op with its gradient."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return call(_forward, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        if dy is None:
            return (None,) * 7
        *found, dD = apply(_Gradient, *tensors, saved, dy)
        return *found, None if tensors[5] is None else dD, None


class _Gradient(FirstDerivative):
    name = "cross_scan"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(call(_backward, *arguments))
