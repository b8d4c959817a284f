"""One Hydra block x + s mix(LayerNorm(x)) with its gradient, as one node of the graph that autograd keeps.

Every step is a kernel of its own or a product; gradients that a projection takes together are written side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..causal_conv1d import triton_impl as convolution
from ..gated_norm import triton_impl as gating
from ..gated_norm.triton_step import layer_norm_triton
from ..replay import replayed
from ..transforms import FirstDerivative, apply, function_of
from ..triton_utils import INTERPRETED, cdiv, multiprocessors, next_power_of_2, on_device
from .blocks import HydraWeights
from .triton_backward import _layer_norm_bwd_kernel, _steps_bwd_kernel
from .triton_blocks import narrow
from .triton_impl import _backward as quasiseparable_gradients
from .triton_pieces import PieceLaunches
from .triton_short import BLOCK_H, LONGEST, _mix_kernel, _vectors_kernel, mix_options, piece_of, tile_of

# Parts of one recorded call, no ops of their own.
_layer_norm, _convolve, _gate, _mix_gradients = map(
    function_of, (layer_norm_triton, convolution._forward, gating._forward, quasiseparable_gradients)
)


class _Sizes:
    """Sizes of a block on a stream (b, l, d), and the parts of its buffers."""

    def __init__(self, x: Tensor, own: HydraWeights, headdim: int, d_state: int) -> None:
        self.batch, self.length, self.channels = x.shape
        self.rows = self.batch * self.length
        self.nheads, self.d_inner = own.from_x.shape
        self.mixed, _, self.k = own.conv.shape
        self.headdim, self.d_state = headdim, d_state
        self.maps = (self.mixed - self.d_inner) // 4
        self.used = self.d_inner, self.mixed, self.nheads, self.nheads

    def of_projection(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z (b l, d_inner), what is convolved (b, l, mixed), dt_f and dt_b (b l, h) in what the projection gives."""
        z, mixed, dt_f, dt_b, _ = p.split(
            [
                self.d_inner,
                self.mixed,
                self.nheads,
                self.nheads,
                p.shape[1] - self.d_inner - self.mixed - 2 * self.nheads,
            ],
            dim=1,
        )
        return z, mixed.unflatten(0, (self.batch, self.length)), dt_f, dt_b

    def of_convolution(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (b, l, h, p) and B_f, C_f, B_b, C_b (b, l, g, n) in what the convolution gives, (b, l, mixed)."""
        x, *maps = c.split([self.d_inner, *4 * [self.maps]], dim=2)
        B_f, C_f, B_b, C_b = (one.unflatten(2, (-1, self.d_state)) for one in maps)
        return x.unflatten(2, (self.nheads, self.headdim)), B_f, C_f, B_b, C_b


def hydra_blocks_with_gradients(
    x: Tensor,
    blocks: Sequence[HydraWeights],
    headdim: int,
    d_state: int,
    eps: float,
    gate_eps: float,
    dtype: torch.dtype,
    scale: Callable[[int], Tensor | None] | None,
) -> Tensor:
    """See `hydra_blocks`."""
    with torch.no_grad():
        products = narrow(blocks, dtype)
    for k, own in enumerate(blocks):
        factor = None if scale is None else scale(k)
        x = _Block.apply(x, *own, factor, *products[3 * k : 3 * k + 3], headdim, d_state, eps, gate_eps)
    return x


class _Block(torch.autograd.Function):
    """One block, from the stream, its parameters and the rounded and transposed ones of its products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        x = x.contiguous()
        *tensors, headdim, d_state, eps, gate_eps = arguments
        *weights, scale, W_in, W_D, W_out = tensors
        y, *kept = _forward(x, *arguments)
        ctx.save_for_backward(x, *kept, scale, W_in, W_D, W_out, *weights)
        ctx.options = headdim, d_state, eps, gate_eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        found = apply(_BlockGradient, dy.contiguous(), *ctx.saved_tensors, *ctx.options)
        return *found, *(None,) * 8


class _BlockGradient(FirstDerivative):
    name = "hydra_blocks"

    @staticmethod
    def forward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return _gradients(dy, *arguments)


@replayed
def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The stream after a block, and what the gradient needs: n, p, c, the diagonal, decays and steps, m and g."""
    *weights, scale, W_in, W_D, W_out, headdim, d_state, eps, gate_eps = arguments
    own, dtype = HydraWeights(*weights), W_in.dtype
    size = _Sizes(x, own, headdim, d_state)
    n = _layer_norm(x, own.norm, own.norm_bias, eps, dtype).flatten(0, 1)
    p = torch.mm(n, W_in)
    z, mixed, dt_f, dt_b = size.of_projection(p)
    filters = own.conv.flatten(1)
    c = _convolve(mixed, filters, own.conv_bias, None, (size.k - 1) // 2, size.length, True)
    steps, diag, m = _mix(size, c, W_D, dt_f, dt_b, own)
    g = _gate(m, z, own.gate, gate_eps, size.d_inner, True)
    o = torch.mm(g, W_out).view(x.shape)
    return x + (o if scale is None else scale * o), n, p, c, diag, steps, m, g


@replayed
def _gradients(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    x, n, p, c, diag, steps, y, g, scale, W_in, W_D, W_out, *rest = arguments
    *weights, headdim, d_state, eps, gate_eps = rest
    own, dtype = HydraWeights(*weights), n.dtype
    size = _Sizes(x, own, headdim, d_state)
    z, mixed, dt_f, dt_b = size.of_projection(p)
    dp = torch.empty_like(p)
    dz, dmixed, ddt_f, ddt_b = size.of_projection(dp)
    if (used := sum(size.used)) < p.shape[1]:
        dp[:, used:].zero_()
    do = (dy if scale is None else scale * dy).to(dtype).flatten(0, 1)
    dout_proj = torch.mm(do.t(), g)
    dm, dgate = gating.write_gradients(y, z, own.gate, torch.mm(do, W_out.t()), gate_eps, size.d_inner, True, dz)
    u, *maps = size.of_convolution(c)
    B_f, C_f, B_b, C_b = maps
    du, ddecay_f, dweight_f, dB_f, dC_f, ddecay_b, dweight_b, dB_b, dC_b, ddiag, *_ = _mix_gradients(
        u, steps[0], steps[2], B_f, C_f, steps[1], steps[3], B_b, C_b, diag, None, None, dm.view(u.shape), None, True,
        0, 0, 0,
    )  # fmt: skip
    dd = torch.empty(size.rows, W_D.shape[1], dtype=dtype, device=x.device)
    sums = _through_steps(
        size, own, (dt_f, dt_b), (ddecay_f, dweight_f, ddecay_b, dweight_b, ddiag), (ddt_f, ddt_b), dd
    )
    dc = torch.cat([one.flatten(2) for one in (du, dB_f, dC_f, dB_b, dC_b)], dim=2)
    flat, dflat = c.flatten(0, 1)[:, : size.d_inner], dc.flatten(0, 1)[:, : size.d_inner]
    dflat.addmm_(dd, W_D.t())
    dfrom_x = torch.mm(dd.t(), flat)[: size.nheads]
    dconv = convolution.write_gradients(
        mixed, own.conv.flatten(1), own.conv_bias, None, dc, (size.k - 1) // 2, True, dmixed
    )
    din_proj = torch.mm(dp.t(), n)[:used]
    dx, dnorm = _through_norm(x, own.norm, torch.mm(dp, W_in.t()), dy, eps)
    return (
        dx, dnorm[0], dnorm[1], din_proj.to(x.dtype), dconv[:-1].t().unsqueeze(1), dconv[-1], sums[0], sums[1],
        dfrom_x.to(x.dtype), sums[2], dgate, dout_proj.to(x.dtype),
    )  # fmt: skip


def _mix(
    size: _Sizes, c: Tensor, W_D: Tensor, dt_f: Tensor, dt_b: Tensor, own: HydraWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Decays and steps of both sides (4, b, l, h), the diagonal (b, l, h), and the product (b l, d_inner)."""
    batch, length, nheads = size.batch, size.length, size.nheads
    x, B_f, C_f, B_b, C_b = size.of_convolution(c)
    groups, piece, stride = B_f.shape[2], piece_of(length), dt_f.stride(0)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=c.device)

    steps, y = empty(4, batch, length, nheads), empty(size.rows, size.d_inner, dtype=c.dtype)
    launches, between = None, None
    if length > LONGEST:
        launches = PieceLaunches(
            batch, length, nheads, size.headdim, size.d_state, groups, stride, c.dtype, c.device, gated=False
        )
        between = launches.buffers()
    vectors, ends = (empty(4, batch, nheads, piece), None) if between is None else between[:2]
    with on_device(c):
        _vectors_kernel[(batch * cdiv(length, piece) * cdiv(nheads, BLOCK_H),)](
            dt_f, dt_b, own.dt_bias, own.A_log, vectors, ends, steps, batch, length, nheads, length * stride, stride,
            PIECE=piece, BLOCK_H=BLOCK_H, ENDS=ends is not None, STEPS=True,
        )  # fmt: skip
        if launches is not None and between is not None:
            launches(c, (B_f, C_f, B_b, C_b), W_D, own.D, between, (None, None, y, None))
            diag = vectors[4].transpose(2, 3).flatten(1, 2)[:, :length].contiguous()
        else:
            tile, d = tile_of(nheads // groups), torch.mm(c.flatten(0, 1)[:, : size.d_inner], W_D)
            _mix_kernel[(batch * cdiv(length, tile.rows) * (nheads // tile.heads),)](
                x, B_f, C_f, B_b, C_b, vectors, d, own.D, None, None, y, None, batch, length, nheads,
                nheads // groups, *x.stride()[:2], *B_f.stride()[:2], d.shape[1], 0,
                **mix_options(c.dtype, size.headdim, size.d_state, length, tile), GATED=False,
            )  # fmt: skip
            diag = (d[:, :nheads] + own.D).unflatten(0, (batch, length))
    return steps, diag, y


def _through_steps(
    size: _Sizes,
    own: HydraWeights,
    raw: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, ...],
    into: tuple[Tensor, Tensor],
    dd: Tensor,
) -> Tensor:
    """Write the gradients of raw steps and of what fc_D gives; returns those of dt_bias, A_log and D, (3, h)."""
    block_r = 1024 if INTERPRETED else 64
    programs = cdiv(size.rows, block_r)
    partial = torch.empty(programs, 3, size.nheads, dtype=torch.float32, device=dd.device)
    with on_device(dd):
        _steps_bwd_kernel[(programs,)](
            *raw, own.dt_bias, own.A_log, *gradients, *into, dd, partial, size.rows, size.nheads, raw[0].stride(0),
            dd.shape[1], BLOCK_R=block_r, BLOCK_H=next_power_of_2(dd.shape[1]),
        )  # fmt: skip
    return partial.sum(0)


def _through_norm(x: Tensor, weight: Tensor, dn: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dy and what comes through the layer norm; gradients of its weight and bias, (2, d)."""
    channels, rows = x.shape[-1], x.numel() // x.shape[-1]
    columns = next_power_of_2(channels)
    block_r = max(1, min(next_power_of_2(rows), (16384 if INTERPRETED else 2048) // columns))
    each = cdiv(cdiv(rows, 4 * multiprocessors(x.device)), block_r) * block_r
    partial = torch.empty(cdiv(rows, each), 2, channels, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x)
    with on_device(x):
        _layer_norm_bwd_kernel[(partial.shape[0],)](
            x, weight, dn, dy, dx, partial, rows, each, channels, EPS=eps, BLOCK_R=block_r, BLOCK=columns,
            num_warps=4 if columns <= 2048 else 8,
        )  # fmt: skip
    return dx, partial.sum(0)
