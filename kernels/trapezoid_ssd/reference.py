"""The recurrence as a loop, the definition that the other paths are compared with.

phi_t = (phi_{t-1} + pi tanh(theta_t) (gamma_t + beta_t)) mod 2 pi
k_t = rot(B_t + B_bias; phi_t),    q_t = rot(C_t + C_bias; phi_t),    v_t = x_rank x_t
H_t = e^{log_decay_t} (H_{t-1} + beta_t v_{t-1} k_{t-1}^T) + gamma_t v_t k_t^T      (sums over ranks)
y_t = H_t q_t + D v_t                                                               (one per rank)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .state import TrapezoidState, rotate


def trapezoid_ssd_reference(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    x_rank: Tensor,
    seq_idx: Tensor | None,
    half: bool,
) -> tuple[Tensor, TrapezoidState]:
    """See `trapezoid_ssd`; everything but x, B and C has the dtype of the state."""
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            kept = (torch.where(same.view(-1, *[1] * (part.dim() - 1)), part, 0.0) for part in state)
            state = TrapezoidState(*kept)
        y, state = advance(
            x[:, t], log_decay[:, t], gamma[:, t], beta[:, t], theta[:, t], B[:, t], C[:, t], state,
            B_bias, C_bias, D, x_rank, half,
        )  # fmt: skip
        outputs.append(y)
    return torch.stack(outputs, dim=1).to(x.dtype), state


def advance(
    x: Tensor,
    log_decay: Tensor,
    gamma: Tensor,
    beta: Tensor,
    theta: Tensor,
    B: Tensor,
    C: Tensor,
    state: TrapezoidState,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    x_rank: Tensor,
    half: bool,
) -> tuple[Tensor, TrapezoidState]:
    """One position: x (b, h, p), B and C (b, r, g, n); y (b, r, h, p) in the dtype of the sums."""
    dtype, (nheads, groups) = log_decay.dtype, (x.shape[1], B.shape[2])
    delta = math.pi * theta.tanh()[:, None] * (gamma + beta)[..., None]
    phi = (state.phi.to(dtype) + delta).remainder(2 * math.pi)
    cos, sin = phi.cos()[:, None], phi.sin()[:, None]
    keys, queries = (part.to(dtype).repeat_interleave(nheads // groups, dim=2) for part in (B, C))
    k = rotate(keys + B_bias.transpose(0, 1), cos, sin, half)  # (b, r, h, n)
    q = rotate(queries + C_bias.transpose(0, 1), cos, sin, half)
    ranks = x_rank.transpose(0, 1)  # (r, h, p)
    v, v_before = x.to(dtype)[:, None] * ranks, state.v.to(dtype)[:, None] * ranks
    # No matrix products: autocast would round their operands.
    before = (v_before[..., None] * state.k.to(dtype)[..., None, :]).sum(1)
    now = (v[..., None] * k[..., None, :]).sum(1)
    decay, beta, gamma = (part[..., None, None] for part in (log_decay.exp(), beta, gamma))
    ssm = decay * (state.ssm.to(dtype) + beta * before) + gamma * now
    y = (ssm[:, None] * q[..., None, :]).sum(-1) + D[:, None] * v
    return y, TrapezoidState(phi, ssm, k, x)
