"""The key of the last position, which the state of `trapezoid_ssd` holds, in one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import apply, call, one_by_one, operator
from ..triton_utils import next_power_of_2, on_device, quick
from .state import rotate, spin
from .triton_step import _pairs, _turned


def last_key(phi: Tensor, B: Tensor, bias: Tensor, half: bool) -> Tensor:
    """Keys turned by their angles, (b, r, h, n) in the dtype of `phi`.

    Args:
        phi: Angles, (b, h, s).
        B: Of the last position, (b, r, g, n).
        bias: Added for each head, (h, r, n).
        half: Whether pairs are half a state apart.
    """
    return apply(_LastKey, phi, B, bias, half)


@quick
@triton.jit(do_not_specialize=["heads", "ranks", "heads_per_group"])
def _last_key_kernel(
    phi_ptr, B_ptr, bias_ptr, k_ptr, heads, ranks, heads_per_group, B_stride_b,
    N: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All ranks of one head of one row."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    groups, group = heads // heads_per_group, head // heads_per_group
    n = tl.arange(0, BLOCK_N)
    ok = n < N
    first, pair, partner, turns = _pairs(n, N, S, HALF)
    phi = tl.load(phi_ptr + (row * heads + head) * S + pair, mask=turns & ok, other=0.0).to(ACC)
    cos = tl.where(turns, tl.cos(phi), 1.0)
    sin = tl.where(turns, tl.sin(phi), 0.0)
    sin = tl.where(first, -sin, sin)
    for j in range(ranks):
        of_key = B_ptr + row * B_stride_b + (j * groups + group) * N
        key = _turned(of_key, bias_ptr, (head * ranks + j) * N, n, partner, ok, cos, sin, True)
        tl.store(k_ptr + ((row * ranks + j) * heads + head) * N + n, key, mask=ok)


@operator("trapezoid_last_key_triton")
@replayed
def key_op(phi: Tensor, B: Tensor, bias: Tensor, half: bool) -> Tensor:
    (batch, ranks, groups, n), heads = B.shape, phi.shape[1]
    phi, bias = phi.contiguous(), bias.contiguous()
    B = B if B[0].is_contiguous() else B.contiguous()
    k = phi.new_empty(batch, ranks, heads, n)
    with on_device(phi):
        _last_key_kernel[(batch * heads,)](
            phi, B, bias, k, heads, ranks, heads // groups, B.stride(0), N=n, S=phi.shape[2], HALF=half,
            ACC=tl.float64 if phi.dtype == torch.float64 else tl.float32, BLOCK_N=next_power_of_2(n),
        )  # fmt: skip
    return k


@torch.library.register_fake("ssm::trapezoid_last_key_triton")
def _(phi: Tensor, B: Tensor, bias: Tensor, half: bool) -> Tensor:
    return phi.new_empty(*B.shape[:2], phi.shape[1], B.shape[3])


@torch.library.register_vmap("ssm::trapezoid_last_key_triton")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    (found,), _ = one_by_one(lambda *one: (key_op(*one),), info.batch_size, in_dims, arguments)
    return found, 0


class _LastKey(torch.autograd.Function):
    """The op with its gradient, in torch: training rarely needs it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return call(key_op, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        phi, B, _, ctx.half = inputs
        ctx.save_for_backward(phi, output)
        ctx.groups, ctx.dtype = B.shape[2], B.dtype

    @staticmethod
    def backward(ctx: Any, dk: Tensor) -> tuple[Tensor | None, ...]:
        phi, k = ctx.saved_tensors
        dphi, dB, dbias = key_gradients(dk, phi, k, ctx.groups, ctx.half)
        return dphi, dB.to(ctx.dtype), dbias, None


def key_gradients(dk: Tensor, phi: Tensor, k: Tensor, groups: int, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of angles, B and bias, in the dtype of the angles.

    Args:
        dk: Gradient of the keys.
        phi: Angles.
        k: The keys.
        groups: Of B.
        half: Whether pairs are half a state apart.
    """
    dkeys = rotate(dk, phi.cos()[:, None], -phi.sin()[:, None], half)
    dphi = spin(dk, k, phi.shape[2], half).sum(1)
    return dphi, dkeys.unflatten(2, (groups, -1)).sum(3), dkeys.sum(0).transpose(0, 1)
