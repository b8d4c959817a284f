"""HiSS: a state-space model over pieces of a sequence below another one over the pieces' last outputs.

Bhirangi et al. (2024), "Hierarchical State Space Models for Continuous Sequence-to-Sequence Modeling".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ssmcore import Stack
from .layers import Output, instance_statistics

if TYPE_CHECKING:
    from ..windows import WindowBatch

__all__ = ["HiSS", "HierarchicalStack"]


class HierarchicalStack(nn.Module):
    """Sequences (b, l, d) to one output for every `ratio` steps, (b, ceil(l / ratio), d).

    Output c sees the steps before (c + 1) ratio only, counted so that the last piece is whole: a length that `ratio`
    does not divide is padded at the start, under a mask.

    Args:
        d_model: Width.
        ratio: Steps in a piece.
        low_layers: Blocks over the steps of a piece.
        high_layers: Blocks over pieces.
        mixer: Name of a causal sequence mixer.
        mixer_options: Its options.
    """

    def __init__(
        self,
        d_model: int,
        *,
        ratio: int = 10,
        low_layers: int = 1,
        high_layers: int = 2,
        mixer: str = "mamba",
        mixer_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if ratio < 1:
            raise ValueError(f"expected a ratio of at least 1 step per piece, got {ratio}")
        self.ratio = ratio
        self.low, self.high = (
            Stack(d_model, [mixer] * count, mixer_options=mixer_options) for count in (low_layers, high_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (b, ceil(l / ratio), d)."""
        batch, length = x.shape[:2]
        missing = -length % self.ratio
        pieces = F.pad(x, (0, 0, missing, 0)).unflatten(1, (-1, self.ratio)).flatten(0, 1)
        mask = None
        if missing:
            real = torch.arange(length + missing, device=x.device) >= missing
            mask = real.unflatten(0, (-1, self.ratio)).expand(batch, -1, -1).flatten(0, 1)
        last = self.low(pieces, mask=mask)[:, -1]
        return self.high(last.unflatten(0, (batch, -1)))


class HiSS(nn.Module):
    """Forecaster: all variates of a step are one token, `HierarchicalStack`, linear head on its last output.

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Number of variates.
        d_model: Width of a token.
        ratio: Steps in a piece.
        low_layers: Blocks over the steps of a piece.
        high_layers: Blocks over pieces.
        dropout: Before the head.
        quantiles: Ascending levels in (0, 1); None forecasts a point.
        distribution: "normal", "student_t" or "negative_binomial" (for counts), whose parameters are forecast instead.
        mixer: Name of a causal sequence mixer.
        mixer_options: Its options.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        d_model: int = 64,
        ratio: int = 8,
        low_layers: int = 1,
        high_layers: int = 2,
        dropout: float = 0.1,
        quantiles: Sequence[float] | None = None,
        distribution: str | None = None,
        mixer: str = "mamba",
        mixer_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.horizon, self.n_variates = horizon, n_variates
        self.output = Output(quantiles, distribution)
        self.embed = nn.Linear(2 * n_variates, d_model)
        self.stack = HierarchicalStack(
            d_model,
            ratio=ratio,
            low_layers=low_layers,
            high_layers=high_layers,
            mixer=mixer,
            mixer_options=mixer_options or ({"d_state": 8, "expand": 1} if mixer == "mamba" else None),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, n_variates * horizon * self.output.numbers)

    def forward(self, batch: WindowBatch) -> Tensor:
        """Forecast in the units of `batch.x`: (b, i, horizon), with quantiles or a distribution (b, i, horizon, q)."""
        statistics = instance_statistics(batch.x, batch.x_mask)
        x = statistics.normalize(batch.x, batch.x_mask)
        hidden = self.stack(self.embed(torch.cat([x, batch.x_mask.to(x.dtype)], dim=1).mT))[:, -1]
        y = self.head(self.dropout(hidden)).unflatten(-1, (self.n_variates, self.horizon, -1))
        return self.output(y, statistics)
