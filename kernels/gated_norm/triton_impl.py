"""The norm in Triton: a tile holds whole groups, so each tensor is read and written once in either direction.

    u = x silu(z), r = rsqrt(mean(u^2) + eps), y = u r w
    du = r (dy w - u r^2 mean(dy w u)),  dx = du silu(z),  dz = du x silu'(z),  dw = sum dy u r
    norm first: n = x r, dx = r (dn - x r^2 mean(dn x)) with dn = dy w silu(z),  dz = dy n w silu'(z)

The gradient of the weight leaves each program as one partial sum; the sums are added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import FirstDerivative, apply, call, fold, operator, unfold
from ..triton_utils import INTERPRETED, cdiv, last_contiguous, multiprocessors, next_power_of_2, on_device, quick

# Programs per multiprocessor in the backward pass; each leaves one row of partial sums.
_PROGRAMS = 2


@quick
@triton.jit(do_not_specialize=["rows"])
def _gated_norm_fwd_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    y_ptr,
    rows,
    channels,
    group_size,
    x_stride,
    z_stride,
    EPS: tl.constexpr,  # a float argument would be rounded to float32
    NORM_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.arange(0, BLOCK_N)[None, :]
    channel = tl.program_id(1) * group_size + column
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = column < group_size
    ok = (row < rows) & inside
    x = tl.load(x_ptr + row * x_stride + channel, mask=ok, other=0.0).to(ACC)
    z = tl.load(z_ptr + row * z_stride + channel, mask=ok, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    gate = z * tl.sigmoid(z)
    u = x
    if not NORM_FIRST:
        u = x * gate
    y = u * (1.0 / tl.sqrt(tl.sum(u * u, axis=1) / group_size + EPS))[:, None] * weight
    if NORM_FIRST:
        y = y * gate
    tl.store(y_ptr + row * channels + channel, y, mask=ok)


@quick
@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def _gated_norm_bwd_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    dy_ptr,
    dx_ptr,
    dz_ptr,
    partial_ptr,
    rows,
    rows_per_program,
    channels,
    group_size,
    x_stride,
    z_stride,
    dz_stride,
    EPS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.arange(0, BLOCK_N)[None, :]
    channel = tl.program_id(1) * group_size + column
    inside = column < group_size
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    dweight = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    begin = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    row = begin + tl.arange(0, BLOCK_R)[:, None]
    ok = (row < end) & inside
    x_ahead = tl.load(x_ptr + row * x_stride + channel, mask=ok, other=0.0)
    z_ahead = tl.load(z_ptr + row * z_stride + channel, mask=ok, other=0.0)
    dy_ahead = tl.load(dy_ptr + row * channels + channel, mask=ok, other=0.0)
    for start in range(begin, end, BLOCK_R):
        x, z, dy = x_ahead.to(ACC), z_ahead.to(ACC), dy_ahead.to(ACC)
        # The next rows arrive while these are summed over.
        row = start + BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        ok = (row < end) & inside
        x_ahead = tl.load(x_ptr + row * x_stride + channel, mask=ok, other=0.0)
        z_ahead = tl.load(z_ptr + row * z_stride + channel, mask=ok, other=0.0)
        dy_ahead = tl.load(dy_ptr + row * channels + channel, mask=ok, other=0.0)
        sigmoid = tl.sigmoid(z)
        gate = z * sigmoid
        dgate = sigmoid * (1.0 + z * (1.0 - sigmoid))
        u = x
        du = dy * weight
        if NORM_FIRST:
            du = du * gate
        else:
            u = x * gate
        r = (1.0 / tl.sqrt(tl.sum(u * u, axis=1) / group_size + EPS))[:, None]
        if NORM_FIRST:
            dz = dy * weight * u * r * dgate
            dweight += dy * u * r * gate
        else:
            dweight += dy * u * r
        du = r * (du - u * (r * r) * (tl.sum(du * u, axis=1) / group_size)[:, None])
        dx = du
        if not NORM_FIRST:
            dx = du * gate
            dz = du * x * dgate
        row = start + tl.arange(0, BLOCK_R)[:, None]
        ok = (row < end) & inside
        tl.store(dx_ptr + row * channels + channel, dx, mask=ok)
        tl.store(dz_ptr + row * dz_stride + channel, dz, mask=ok)
    out = tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(partial_ptr + out, tl.sum(dweight, axis=0)[None, :], mask=inside)


def gated_norm_triton(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """See `gated_norm`; x, z (..., d), weight (d,) in the dtype to compute in."""
    return apply(_GatedNorm, x, z, weight, eps, group_size, norm_before_gate)


@operator("gated_norm_triton_fwd")
@replayed
def _forward(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_first: bool) -> Tensor:
    x, z, weight = last_contiguous(x), last_contiguous(z), weight.contiguous()
    rows, channels = x.shape
    y = x.new_empty(x.shape)
    tile = _tile(rows, group_size)
    with on_device(x):
        _gated_norm_fwd_kernel[(cdiv(rows, tile["BLOCK_R"]), channels // group_size)](
            x, z, weight, y, rows, channels, group_size, x.stride(0), z.stride(0), eps,
            NORM_FIRST=norm_first, ACC=_acc(weight), **tile,
        )  # fmt: skip
    return y


@torch.library.register_fake("ssm::gated_norm_triton_fwd")
def _(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_first: bool) -> Tensor:
    return x.new_empty(x.shape)


@operator("gated_norm_triton_bwd")
@replayed
def _backward(
    x: Tensor, z: Tensor, weight: Tensor, dy: Tensor, eps: float, group_size: int, norm_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dz = z.new_empty(z.shape)
    dx, dweight = write_gradients(x, z, weight, dy, eps, group_size, norm_first, dz)
    return dx, dz, dweight


def write_gradients(
    x: Tensor, z: Tensor, weight: Tensor, dy: Tensor, eps: float, group_size: int, norm_first: bool, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of z to `dz`, whose channels are neighbours in memory; returns those of x and the weight."""
    x, z, weight, dy = last_contiguous(x), last_contiguous(z), weight.contiguous(), dy.contiguous()
    rows, channels = x.shape
    dx = x.new_empty(x.shape)
    tile = _tile(rows, group_size)
    groups = channels // group_size
    wanted = cdiv(_PROGRAMS * multiprocessors(x.device), groups)
    rows_per_program = cdiv(cdiv(rows, wanted), tile["BLOCK_R"]) * tile["BLOCK_R"]
    programs = cdiv(rows, rows_per_program)
    partial = weight.new_empty(programs, channels)
    with on_device(x):
        _gated_norm_bwd_kernel[(programs, groups)](
            x, z, weight, dy, dx, dz, partial, rows, rows_per_program, channels, group_size,
            x.stride(0), z.stride(0), dz.stride(0), eps, NORM_FIRST=norm_first, ACC=_acc(weight), **tile,
        )  # fmt: skip
    return dx, partial.sum(0)


@torch.library.register_fake("ssm::gated_norm_triton_bwd")
def _(
    x: Tensor, z: Tensor, weight: Tensor, dy: Tensor, eps: float, group_size: int, norm_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


class _GatedNorm(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_first: bool) -> Tensor:
        y: Tensor = call(_forward, _rows(x), _rows(z), weight, eps, group_size, norm_first)
        return y.view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, z, weight, ctx.eps, ctx.group_size, ctx.norm_first = inputs
        ctx.save_for_backward(x, z, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight = ctx.saved_tensors
        rows, options = (_rows(x), _rows(z), weight, _rows(dy)), (ctx.eps, ctx.group_size, ctx.norm_first)
        dx, dz, dweight = apply(_GatedNormGradient, *rows, *options)
        return dx.view(x.shape), dz.view(x.shape), dweight, None, None, None


class _GatedNormGradient(FirstDerivative):
    name = "gated_norm"

    @staticmethod
    def forward(
        x: Tensor, z: Tensor, weight: Tensor, dy: Tensor, eps: float, group_size: int, norm_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return call(_backward, x, z, weight, dy, eps, group_size, norm_first)


@torch.library.register_vmap("ssm::gated_norm_triton_fwd")
def _(info: Any, in_dims: tuple[Any, ...], x: Tensor, z: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, int]:
    count = info.batch_size
    if in_dims[2] is None:
        folded = [fold(tensor, dim, count) for tensor, dim in zip((x, z), in_dims)]
        return unfold(_forward(*folded, weight, *options), count), 0
    arguments = zip(*(_each(tensor, dim, count) for tensor, dim in zip((x, z, weight), in_dims)))
    return torch.stack([_forward(*one, *options) for one in arguments]), 0


@torch.library.register_vmap("ssm::gated_norm_triton_bwd")
def _(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, z: Tensor, weight: Tensor, dy: Tensor, *options: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    # The gradient of the weight is a separate sum for each mapped instance, hence separate launches.
    arguments = zip(*(_each(tensor, dim, info.batch_size) for tensor, dim in zip((x, z, weight, dy), in_dims)))
    results = [_backward(*one, *options) for one in arguments]
    return tuple(torch.stack(parts) for parts in zip(*results)), (0, 0, 0)


def _rows(tensor: Tensor) -> Tensor:
    """(..., d) as (r, d)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _each(tensor: Tensor, mapped: int | None, count: int) -> list[Tensor]:
    return [tensor] * count if mapped is None else list(tensor.unbind(mapped))


def _acc(weight: Tensor) -> Any:
    return tl.float64 if weight.dtype == torch.float64 else tl.float32


def _tile(rows: int, group_size: int) -> dict[str, int]:
    """Rows and channels of a tile: a whole group, and as many rows as make up 2048 channels."""
    block_n = next_power_of_2(group_size)
    block_r = max(1, min(next_power_of_2(rows), (16384 if INTERPRETED else 2048) // block_n))
    return {"BLOCK_R": block_r, "BLOCK_N": block_n, "num_warps": 8 if block_n <= 8192 else 16}
