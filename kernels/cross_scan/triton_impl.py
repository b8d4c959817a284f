"""`cross_scan` in Triton: the four orders are strides, one launch forwards and one backwards.

A program has a block of channels of one grid and one order, with all states in registers (a lane holds K neighbouring
ones of a channel, SUB lanes all n), and walks the cells of its order. It leaves y of its order in the dtype of x, and
one sum adds the four; inputs are never rearranged. Every 64th state is kept. The backward pass walks these stretches
from the last to the first: it leaves the state before each TIME positions in a scratch buffer, forms those in between
again in registers and goes back over them. Sums over channels leave a program as partial sums that are added in a fixed
order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transforms import FirstDerivative, apply, operator
from ..triton_utils import INTERPRETED, on_device
from .triton_kernels import _cross_scan_bwd_kernel, _cross_scan_fwd_kernel

_SAVED = 64


def cross_scan_triton(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """See `cross_scan`; A and D in the dtype of the states, which is that of the sum."""
    y, _ = apply(_Scan, x, dt, A, B, C, D, torch.is_grad_enabled())
    return y


@operator("cross_scan_triton_fwd")
def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    """Output, and with `save` every 64th state."""
    x, dt, A, B, C = (t.contiguous() for t in (x, dt, A, B, C))
    D = None if D is None else D.contiguous()
    rows, columns = x.shape[1:3]
    options = _options(x, A, D, backward=False)
    grid = _grid(x, options)
    y = x.new_empty(4, *x.shape)
    with on_device(x):
        saved = _saved(x, A, save)
        _cross_scan_fwd_kernel[grid](
            x, dt, A, B, C, A if D is None else D, y, saved, rows, columns, SAVE=save, **options
        )
    return y.sum(0, dtype=A.dtype), saved


@operator("cross_scan_triton_bwd")
def _backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, saved: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and D (empty without it)."""
    x, dt, A, B, C, dy = (t.contiguous() for t in (x, dt, A, B, C, dy))
    D = None if D is None else D.contiguous()
    batch, rows, columns, channels = x.shape
    options = _options(x, A, D, backward=True)
    grid = _grid(x, options)
    k, time = options["K"], options["TIME"]
    dx, ddt = x.new_empty(4, *x.shape), torch.empty_like(dt)
    dmaps = A.new_empty(grid[0] // (4 * batch), 2, *B.shape)
    dA, dD = A.new_empty(batch, *A.shape), A.new_empty(batch, 4, channels)
    scratch = A.new_empty(grid[0], _SAVED // time * k * options["BD"] * options["SUB"])
    with on_device(x):
        _cross_scan_bwd_kernel[grid](
            x, dt, A, B, C, A if D is None else D, dy, saved, scratch, dx, ddt, dmaps, dA, dD, rows, columns,
            LEVELS=(2 * k * time).bit_length() - 1, **options,
        )  # fmt: skip
    dB, dC = dmaps.sum(0).to(B.dtype)
    dx = dx.sum(0, dtype=A.dtype).to(x.dtype)
    return dx, ddt, dA.sum(0), dB, dC.clone(), dD.sum(0) if D is not None else A.new_empty(0)


@torch.library.register_fake("ssm::cross_scan_triton_fwd")
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, save: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=A.dtype), _saved(x, A, save)


@torch.library.register_fake("ssm::cross_scan_triton_bwd")
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, saved: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    found = [t.new_empty(t.shape) for t in (x, dt, A, B, C)]
    return *found, A.new_empty(0 if D is None else D.shape)


def _options(x: Tensor, A: Tensor, D: Tensor | None, backward: bool) -> dict[str, Any]:
    """One warp where a lane has all states of its channel; four, for sums over more channels, where it has not."""
    n, channels = A.shape[2], x.shape[3]
    padded = triton.next_power_of_2(n)
    k = (2 if padded == 4 else 1) if INTERPRETED else min(4, padded)
    sub = padded // k
    lanes = 32 if sub == 1 else max(128, sub)
    options: dict[str, Any] = {
        "CHANNELS": channels, "N": n, "K": k, "SUB": sub,
        "BD": min(lanes // sub, triton.next_power_of_2(channels)),
        "TIME": (4 if k > 1 else 8) if backward else 16 if k == 1 else 8,
        "SAVED": _SAVED, "HAS_D": D is not None, "PRECISE": x.element_size() >= 4,
        "ACC": tl.float64 if A.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    if INTERPRETED:
        return options | {"TIME": 4}
    return options | {"num_warps": max(1, min(4, options["BD"] * sub // 32))}


def _grid(x: Tensor, options: dict[str, Any]) -> tuple[int]:
    return (x.shape[0] * 4 * triton.cdiv(x.shape[3], options["BD"]),)


def _saved(x: Tensor, A: Tensor, save: bool) -> Tensor:
    options = _options(x, A, None, backward=False)
    chunks = triton.cdiv(x.shape[1] * x.shape[2], _SAVED) if save else 0
    return A.new_empty(_grid(x, options)[0] * chunks * options["K"] * options["BD"] * options["SUB"])


class _Scan(torch.autograd.Function):
    """The forward op with its gradient."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _forward(*arguments)

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
        return _backward(*arguments)
