"""Mixing matrices with the short convolution and the gate counted in.

SiLU is c sigmoid(c), so a convolution with weight matrix T and bias b, then SiLU, a mixer M and a gate g are together

    y = g * M (s * (T x + b)),    s = sigmoid(T x + b):     M_eff = diag(g) M diag(s) T,    offset g * M (s * b)

Ali, Zimerman & Wolf (2024), "The Hidden Attention of Mamba Models", section 3, with the activation counted in.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import MixingMatrix, wide


def effective_matrix(
    plain: MixingMatrix,
    x: Tensor,
    gate: Tensor,
    conv: nn.Conv1d,
    channels: Tensor,
    *,
    before: Tensor | None = None,
    symmetric: bool = False,
    activation: Literal["silu"] | None = "silu",
) -> MixingMatrix:
    """Count convolution and gate into the matrices of single channels.

    Args:
        plain: Operator on the convolved signal, one head of one channel each, (b, c, l, l).
        x: What the convolution gets, (b, l, c).
        gate: Factor of the outputs, (b, l, c).
        conv: The convolution's parameters.
        channels: Which of its channels these are, (c,).
        before: Its state, (b, c, k - 1).
        symmetric: Whether it is centred.
        activation: "silu" or None.
    """
    x, gate = wide(x), wide(gate)
    taps = wide(conv.weight[:, 0])[channels].to(x.dtype)  # (c, k)
    length, k = x.shape[1], taps.shape[1]
    position = torch.arange(length, device=x.device)
    tap = position[None, :] - position[:, None] + (k // 2 if symmetric else k - 1)
    toeplitz = torch.where((tap >= 0) & (tap < k), taps[:, tap.clamp(0, k - 1)], 0)  # (c, t, s)
    bias = x.new_zeros(x.shape[2]) if conv.bias is None else wide(conv.bias)[channels].to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        from_before = torch.zeros_like(x)
        if before is not None and k > 1:
            padded = F.pad(wide(before).to(x.dtype), (0, length))  # (b, c, k - 1 + l)
            from_before = F.conv1d(padded, taps[:, None], groups=taps.shape[0]).mT
        convolved = torch.einsum("cts,bsc->btc", toeplitz, x) + from_before + bias
        slope = torch.sigmoid(convolved) if activation == "silu" else torch.ones_like(convolved)
        gated = plain.matrix * gate.mT[..., None] * slope.mT[:, :, None]  # (b, c, t, s)
        matrix = gated @ toeplitz
        offset = torch.einsum("bcts,c->btc", gated, bias)[..., None]
        from_state = None if plain.from_state is None else plain.from_state * gate[..., None]
        if before is not None:
            carried = torch.einsum("bcts,bsc->btc", gated, from_before)[..., None]
            from_state = carried if from_state is None else from_state + carried
    return MixingMatrix(matrix, x[..., None], plain.outputs * gate[..., None], from_state, offset)
