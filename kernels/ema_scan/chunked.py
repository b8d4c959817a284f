"""The recurrence as a linear scan with the decay 1 - p, and its gradient as one more scan in the other direction:

    g_t = dm_t + (1 - p_{t+1}) g_{t+1},    dx_t = p_t g_t,    dp_t = sum_d g_t (x_t - m_{t-1})

The difference x - m is taken before the sum over the channels: where a sequence is smooth, two sums would be nearly
equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear_scan.chunked import _scan, linear_scan_chunked
from ..transforms import apply


def ema_scan_chunked(x: Tensor, p: Tensor, state: Tensor, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `ema_scan`; p and the state have the dtype of the sums."""
    linked = None
    if seq_idx is not None:
        linked = torch.cat([torch.ones_like(seq_idx[:, :1]), seq_idx[:, 1:] == seq_idx[:, :-1]], dim=1).bool()
    means, final = apply(_Ema, x, p, state, linked)
    return means.to(x.dtype), final


def _decay(p: Tensor, linked: Tensor | None) -> Tensor:
    """What is kept of the last mean, (b, l, 1); nothing where a new sequence begins."""
    decay = 1 - p
    return (decay if linked is None else decay * linked)[..., None]


class _Ema(torch.autograd.Function):
    """The scan with its gradient; the means come in the dtype of the sums, which the gradient of p needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, p: Tensor, state: Tensor, linked: Tensor | None) -> tuple[Tensor, Tensor]:
        # The op itself: torch.compile up to 2.11 loses the gradient of a function whose forward calls another one.
        return _scan(_decay(p, linked), p[..., None] * x, state, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(ctx: Any, dmeans: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, p, state, linked, means = ctx.saved_tensors
        decay = _decay(p, linked)
        following = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1)
        g, _ = linear_scan_chunked(following, dmeans, dfinal, True, p.dtype)
        before = torch.cat([state[:, None], means[:, :-1]], dim=1)
        if linked is not None:
            before = before * linked[..., None]
        return (p[..., None] * g).to(x.dtype), (g * (x - before)).sum(-1), decay[:, 0] * g[:, 0], None
