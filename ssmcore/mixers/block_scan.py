"""A linear recurrence whose decay is a small matrix for every channel, in about 2 sqrt(l) vector operations.

    h_t = a_t h_{t-1} + b_t,      g_t = dh_t + a_{t+1}^T g_{t+1},   db_t = g_t,   da_t = g_t h_{t-1}^T

Inside chunks all advance together from a zero state and collect the products of their decays; then the states at the
ends of chunks are handed on. It is one custom op, so that compiled and exported code has no length built in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def block_scan(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    """All states of the recurrence.

    Args:
        a: Decays, (b, l, s, s, n) with l of at least 1.
        b: Inputs, (b, l, s, n), in the dtype of `a`.
        initial_state: State before the first position, (b, s, n).

    Returns:
        (b, l, s, n). Differentiable once in all of them.
    """
    # Not put together of slices: the l - 1 others would tie exported code to some lengths.
    first = (torch.arange(b.shape[1], device=b.device) == 0)[:, None, None]
    return _scan(a, torch.where(first, b + _times(a[:, :1], initial_state[:, None]), b))


def _times(a: Tensor, h: Tensor) -> Tensor:
    """(..., s, s, n) matrices of channels times (..., s, n)."""
    return (a * h[..., None, :, :]).sum(-2)


@torch.library.custom_op("ssm::block_scan", mutates_args=())
def _scan(a: Tensor, b: Tensor) -> Tensor:
    length, size = b.shape[1], b.shape[2]
    q = max(1, math.isqrt(length))
    count = -(-length // q)
    pad = count * q - length
    a = F.pad(a, (0, 0) * 3 + (0, pad)).unflatten(1, (count, q))
    b = F.pad(b, (0, 0) * 2 + (0, pad)).unflatten(1, (count, q))
    states, products = [b[:, :, 0]], [a[:, :, 0]]
    for k in range(1, q):
        states.append(_times(a[:, :, k], states[-1]) + b[:, :, k])
        columns = [_times(a[:, :, k], products[-1][..., j, :]) for j in range(size)]
        products.append(torch.stack(columns, dim=-2))
    carry = [torch.zeros_like(b[:, 0, 0])]
    for c in range(count - 1):
        carry.append(_times(products[-1][:, c], carry[-1]) + states[-1][:, c])
    start = torch.stack(carry, dim=1)[:, :, None]  # (b, count, 1, s, n)
    found = torch.stack(states, dim=2) + _times(torch.stack(products, dim=2), start)
    return found.flatten(1, 2)[:, :length].contiguous()


@_scan.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, Tensor]:
    a, h = ctx.saved_tensors
    later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1).transpose(2, 3)
    g = _scan(later.flip(1), dh.flip(1)).flip(1)
    da = None
    if ctx.needs_input_grad[0]:
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
        da = g[..., None, :] * before[..., None, :, :]
    return da, g


_scan.register_autograd(_backward, setup_context=_keep)
