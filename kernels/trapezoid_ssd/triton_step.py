"""One position of `trapezoid_ssd` in one kernel that reads each state once and writes it once, in place."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import operator
from ..triton_utils import INTERPRETED, next_power_of_2, on_device, quick


@triton.jit
def _pairs(n, N: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr):
    """Of the entries [n] of a key: whether they come first in their pair, which pair, its other entry, if it turns."""
    if HALF:
        first = n < N // 2
        pair = tl.where(first, n, n - N // 2)
        partner = tl.where(first, n + N // 2, n - N // 2)
    else:
        first = n % 2 == 0
        pair = n // 2
        partner = tl.where(first, n + 1, n - 1)
    turns = pair < S
    return first, pair, tl.where(turns, partner, n), turns


@triton.jit
def _turned(ptr, bias_ptr, of_rank, n, partner, ok, cos, sin, HAS_BIAS: tl.constexpr):
    """A key or query [n] with its bias, turned: `partner` is the other entry of a pair, `sin` has the sign of n's."""
    own = tl.load(ptr + n, mask=ok, other=0.0).to(cos.dtype)
    other = tl.load(ptr + partner, mask=ok, other=0.0).to(cos.dtype)
    if HAS_BIAS:
        own += tl.load(bias_ptr + of_rank + n, mask=ok, other=0.0).to(cos.dtype)
        other += tl.load(bias_ptr + of_rank + partner, mask=ok, other=0.0).to(cos.dtype)
    return own * cos + other * sin


@quick
@triton.jit(do_not_specialize=["heads", "ranks", "heads_per_group"])
def _trapezoid_step_kernel(
    x_ptr, log_decay_ptr, gamma_ptr, beta_ptr, theta_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, D_ptr, x_rank_ptr,
    index_ptr, phi_ptr, ssm_ptr, k_ptr, v_ptr, y_ptr,
    heads, ranks, heads_per_group, x_stride_b, B_stride_b, C_stride_b,
    P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr, HAS_B_BIAS: tl.constexpr,
    HAS_C_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_RANK: tl.constexpr, INDEXED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head of one row: states [p, n] in blocks of p, all ranks one after another."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    slot = row
    if INDEXED:
        slot = tl.load(index_ptr + row).to(tl.int64)
    real = slot >= 0  # else the row is padding
    groups = heads // heads_per_group
    of_head, of_state = row * heads + head, slot * heads + head
    n = tl.arange(0, BLOCK_N)
    n_ok = n < N
    first, pair, partner, turns = _pairs(n, N, S, HALF)

    # The angles of this position; all that is read of the old state is read before any of it is written.
    gamma = tl.load(gamma_ptr + of_head).to(ACC)
    beta = tl.load(beta_ptr + of_head).to(ACC)
    decay = tl.exp(tl.load(log_decay_ptr + of_head).to(ACC))
    theta = tl.load(theta_ptr + row * S + pair, mask=turns, other=0.0).to(ACC)
    e = tl.exp(-2.0 * tl.abs(theta))
    rate = (1.0 - e) / (1.0 + e)
    rate = tl.where(theta < 0, -rate, rate) * 3.141592653589793
    phi = tl.load(phi_ptr + of_state * S + pair, mask=turns & real, other=0.0).to(ACC) + rate * (gamma + beta)
    phi -= tl.floor(phi * 0.15915494309189535) * 6.283185307179586
    cos = tl.where(turns, tl.cos(phi), 1.0)
    sin = tl.where(turns, tl.sin(phi), 0.0)
    sin = tl.where(first, -sin, sin)

    group = head // heads_per_group
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        p_ok = p < P
        ok = p_ok[:, None] & n_ok[None, :]
        x = tl.load(x_ptr + row * x_stride_b + head * P + p, mask=p_ok, other=0.0).to(ACC)
        v = tl.load(v_ptr + of_state * P + p, mask=p_ok & real, other=0.0).to(ACC)
        at = ssm_ptr + (of_state * P + p[:, None]) * N + n[None, :]
        h = decay * tl.load(at, mask=ok & real, other=0.0).to(ACC)
        for j in range(ranks):
            k = tl.load(k_ptr + ((slot * ranks + j) * heads + head) * N + n, mask=n_ok & real, other=0.0).to(ACC)
            of_rank = (head * ranks + j) * N
            key = B_ptr + row * B_stride_b + (j * groups + group) * N
            now = _turned(key, B_bias_ptr, of_rank, n, partner, n_ok, cos, sin, HAS_B_BIAS)
            factor = tl.full([BLOCK_P], 1.0, ACC)
            if HAS_RANK:
                factor = tl.load(x_rank_ptr + (head * ranks + j) * P + p, mask=p_ok, other=0.0).to(ACC)
            h += (decay * beta * v * factor)[:, None] * k[None, :] + (gamma * x * factor)[:, None] * now[None, :]
        tl.store(at, h, mask=ok & real)
        for i in range(ranks):
            query = C_ptr + row * C_stride_b + (i * groups + group) * N
            of_rank = (head * ranks + i) * N
            q = _turned(query, C_bias_ptr, of_rank, n, partner, n_ok, cos, sin, HAS_C_BIAS)
            y = tl.sum(h * q[None, :], axis=1)
            if HAS_D:
                skip = tl.load(D_ptr + head).to(ACC) * x
                if HAS_RANK:
                    skip *= tl.load(x_rank_ptr + (head * ranks + i) * P + p, mask=p_ok, other=0.0).to(ACC)
                y += skip
            tl.store(y_ptr + ((row * ranks + i) * heads + head) * P + p, tl.where(real, y, 0.0), mask=p_ok)

    tl.debug_barrier()  # all that is read has been read
    tl.store(phi_ptr + of_state * S + pair, phi, mask=turns & first & n_ok & real)
    for j in range(ranks):
        key = B_ptr + row * B_stride_b + (j * groups + group) * N
        now = _turned(key, B_bias_ptr, (head * ranks + j) * N, n, partner, n_ok, cos, sin, HAS_B_BIAS)
        tl.store(k_ptr + ((slot * ranks + j) * heads + head) * N + n, now, mask=n_ok & real)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        x = tl.load(x_ptr + row * x_stride_b + head * P + p, mask=p < P, other=0.0)
        tl.store(v_ptr + of_state * P + p, x, mask=(p < P) & real)


@operator("trapezoid_step_triton", mutates=("phi", "ssm", "k", "v"))
@replayed
def trapezoid_step_triton(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    phi: Tensor,
    ssm: Tensor,
    k: Tensor,
    v: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    x_rank: Tensor | None,
    state_index: Tensor | None,
    half: bool,
    double: bool,
) -> Tensor:
    """See `trapezoid_step_`; the parts of the state are contiguous. `double`: sums in float64."""
    (batch, heads, headdim), (ranks, groups, states) = x.shape, B.shape[1:]
    x, B, C = (t if t[0].is_contiguous() else t.contiguous() for t in (x, B, C))
    log_decay, gamma, beta, theta = (t.contiguous() for t in (log_decay, gamma, beta, theta))
    B_bias, C_bias, D, x_rank, state_index = (
        None if t is None else t.contiguous() for t in (B_bias, C_bias, D, x_rank, state_index)
    )
    y = x.new_empty(batch, ranks, heads, headdim)
    block_n = next_power_of_2(states)
    block_p = min(next_power_of_2(headdim), max(1, 4096 // block_n))
    warps = 8 if block_p * block_n > 2048 else 4
    with on_device(x):
        _trapezoid_step_kernel[(batch * heads,)](
            x, log_decay, gamma, beta, theta, B, C, B_bias, C_bias, D, x_rank, state_index, phi, ssm, k, v, y,
            heads, ranks, heads // groups, x.stride(0), B.stride(0), C.stride(0),
            P=headdim, N=states, S=theta.shape[1], HALF=half, HAS_B_BIAS=B_bias is not None,
            HAS_C_BIAS=C_bias is not None, HAS_D=D is not None, HAS_RANK=x_rank is not None,
            INDEXED=state_index is not None, ACC=tl.float64 if double else tl.float32,
            BLOCK_P=block_p, BLOCK_N=block_n, **({} if INTERPRETED else {"num_warps": warps}),
        )  # fmt: skip
    return y


@torch.library.register_fake("ssm::trapezoid_step_triton")
def _(*arguments: Any) -> Tensor:
    x, B = arguments[0], arguments[5]
    return x.new_empty(x.shape[0], B.shape[1], *x.shape[1:])
