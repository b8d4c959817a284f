"""The convolution as a loop over positions: y_t = sum_s K(t - s) x_s."""

from __future__ import annotations

import torch
from torch import Tensor


def fft_conv_reference(x: Tensor, taps: Tensor, lead: int, seq_idx: Tensor | None) -> Tensor:
    """y_t = sum_i taps_i x_{t-i+lead}, without terms outside of `x` or of another sequence.

    Args:
        x: (b, l, c), float32 or float64.
        taps: (c, k), like `x`.
        lead: How many taps look ahead; tap `lead` is the one of the position itself.
        seq_idx: (b, l).
    """
    length, k = x.shape[1], taps.shape[1]
    outputs = []
    for t in range(length):
        first, end = max(0, t + lead - (k - 1)), min(length, t + lead + 1)
        reached = x[:, first:end]
        if seq_idx is not None:
            same = seq_idx[:, first:end] == seq_idx[:, t : t + 1]
            reached = torch.where(same[..., None], reached, torch.zeros_like(reached))
        weights = taps[:, t + lead - end + 1 : t + lead - first + 1].flip(1).mT  # the tap of each position reached
        outputs.append((weights * reached).sum(1))
    return torch.stack(outputs, dim=1)
