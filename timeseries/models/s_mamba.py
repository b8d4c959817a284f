"""S-Mamba: every variate's whole lookback is one token; two Mambas mix the variates in both directions.

    y = mamba(x) + flip(mamba'(flip(x)));   x = norm(x + y);   x = norm(x + feed_forward(x))

Wang et al. (2024), "Is Mamba Effective for Time Series Forecasting?".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...ssmcore import create_mixer
from .layers import Output, instance_statistics

if TYPE_CHECKING:
    from ..windows import WindowBatch

__all__ = ["SMamba"]


class SMamba(nn.Module):
    """Forecaster over variates as tokens.

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Not used by the weights: any number of variates goes through.
        d_model: Width of a token.
        d_ff: Inner width of the feed-forward part.
        d_state: States of the Mambas.
        n_layer: Number of layers.
        dropout: After embedding, mixer and feed-forward part.
        quantiles: Ascending levels in (0, 1); None forecasts a point.
        distribution: "normal", "student_t" or "negative_binomial" (for counts), whose parameters are forecast instead.
        n_future: Covariates known in advance, of which the lookback is one token each; they are dropped at the end.
        instance_norm: Normalise each window and variate, and undo it on the forecast.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        d_model: int = 128,
        d_ff: int | None = None,
        d_state: int = 2,
        n_layer: int = 2,
        dropout: float = 0.1,
        quantiles: Sequence[float] | None = None,
        distribution: str | None = None,
        n_future: int = 0,
        instance_norm: bool = True,
    ) -> None:
        super().__init__()
        self.lookback, self.horizon, self.n_future, self.instance_norm = lookback, horizon, n_future, instance_norm
        self.output = Output(quantiles, distribution, instance_norm=instance_norm)
        self.embed, self.dropout = nn.Linear(lookback, d_model), nn.Dropout(dropout)
        self.layers = nn.ModuleList(_Layer(d_model, d_ff or d_model, d_state, dropout) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, horizon * self.output.numbers)

    def forward(self, batch: WindowBatch) -> Tensor:
        """Forecast in the units of `batch.x`: (b, i, horizon), with quantiles or a distribution (b, i, horizon, q)."""
        x, variates = batch.x, batch.x.shape[1]
        statistics = instance_statistics(x, batch.x_mask) if self.instance_norm else None
        if statistics is not None:
            x = statistics.normalize(x, batch.x_mask)
        if self.n_future:
            if batch.future is None or batch.future.shape[1] != self.n_future:
                raise ValueError(f"the model was built for {self.n_future} future covariates, which the data lacks")
            x = torch.cat([x, batch.future[..., : self.lookback]], dim=1)
        hidden = self.dropout(self.embed(x))
        for layer in self.layers:
            hidden = layer(hidden)
        y = self.head(self.norm(hidden[:, :variates])).unflatten(-1, (self.horizon, -1))
        return self.output(y, statistics)


class _Layer(nn.Module):
    def __init__(self, d_model: int, d_ff: int, d_state: int, dropout: float) -> None:
        super().__init__()
        options = {"d_state": d_state, "d_conv": 2, "expand": 1}
        self.mixer = create_mixer("bidirectional", d_model, mixer="mamba", mixer_options=options)
        self.norm, self.ff_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.ff = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.GELU(), nn.Dropout(dropout), nn.Linear(d_ff, d_model), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, d_model)."""
        x = self.norm(x + self.mixer(x))
        return self.ff_norm(x + self.ff(x))
