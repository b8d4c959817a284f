"""Kernels for the gradient of a Hydra block: through the layer norm, and through steps, decays and diagonal."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_utils import quick
from .triton_short import _softplus


@quick
@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def _layer_norm_bwd_kernel(
    x_ptr,
    weight_ptr,
    dn_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    rows_per_program,
    channels,
    EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient dx = dy + what comes through n = LayerNorm(x), and a program's sums for weight and bias."""
    c = tl.arange(0, BLOCK)[None, :]
    inside = c < channels
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0)
    dweight = tl.zeros([BLOCK_R, BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK], tl.float32)
    begin = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        ok = (row < end) & inside
        x = tl.load(x_ptr + row * channels + c, mask=ok, other=0.0)
        dn = tl.load(dn_ptr + row * channels + c, mask=ok, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * channels + c, mask=ok, other=0.0)
        x = tl.where(inside, x - (tl.sum(x, axis=1) / channels)[:, None], 0.0)
        scale = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / channels + EPS))[:, None]
        x = x * scale
        dweight += dn * x
        dbias += dn
        dn = dn * weight
        mean = (tl.sum(dn, axis=1) / channels)[:, None]
        along = (tl.sum(dn * x, axis=1) / channels)[:, None]
        tl.store(dx_ptr + row * channels + c, dy + scale * (dn - mean - x * along), mask=ok)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(out, tl.sum(dweight, axis=0)[None, :], mask=inside)
    tl.store(out + channels, tl.sum(dbias, axis=0)[None, :], mask=inside)


@triton.jit
def _through_step(dt_ptr, ddecay_ptr, dweight_ptr, place, raw_place, bias, rate, ok):
    """Gradient of a raw step, and those of its bias and of the logarithm of its rate at each position."""
    raw = tl.load(dt_ptr + raw_place, mask=ok, other=0.0).to(tl.float32) + bias
    ddecay = tl.load(ddecay_ptr + place, mask=ok, other=0.0)
    dweight = tl.load(dweight_ptr + place, mask=ok, other=0.0)
    draw = tl.where(ok, (dweight + ddecay * rate) * tl.sigmoid(raw), 0.0)
    return draw, tl.where(ok, ddecay * _softplus(raw) * rate, 0.0)


@quick
@triton.jit(do_not_specialize=["rows"])
def _steps_bwd_kernel(
    dt_f_ptr,
    dt_b_ptr,
    bias_ptr,
    A_log_ptr,
    ddecay_f_ptr,
    dweight_f_ptr,
    ddecay_b_ptr,
    dweight_b_ptr,
    ddiag_ptr,
    ddt_f_ptr,
    ddt_b_ptr,
    dd_ptr,
    partial_ptr,
    rows,
    heads,
    dt_stride,
    dd_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradients of raw steps (16 bits) and of what fc_D gives, zero beyond the heads; sums for dt_bias, A_log and D."""
    h = tl.arange(0, BLOCK_H)[None, :]
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = h < heads
    ok = (row < rows) & inside
    bias = tl.load(bias_ptr + h, mask=inside, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(A_log_ptr + h, mask=inside, other=0.0).to(tl.float32))
    place, raw_place = row * heads + h, row * dt_stride + h
    dt_f, dA_f = _through_step(dt_f_ptr, ddecay_f_ptr, dweight_f_ptr, place, raw_place, bias, rate, ok)
    dt_b, dA_b = _through_step(dt_b_ptr, ddecay_b_ptr, dweight_b_ptr, place, raw_place, bias, rate, ok)
    ddiag = tl.load(ddiag_ptr + place, mask=ok, other=0.0)
    tl.store(ddt_f_ptr + raw_place, dt_f, mask=ok)
    tl.store(ddt_b_ptr + raw_place, dt_b, mask=ok)
    tl.store(dd_ptr + row * dd_stride + h, ddiag, mask=(row < rows) & (h < dd_stride))
    out = partial_ptr + tl.program_id(0).to(tl.int64) * 3 * heads + h
    tl.store(out, tl.sum(dt_f + dt_b, axis=0)[None, :], mask=inside)
    tl.store(out + heads, tl.sum(dA_f + dA_b, axis=0)[None, :], mask=inside)
    tl.store(out + 2 * heads, tl.sum(ddiag, axis=0)[None, :], mask=inside)
