"""Forecasts without parameters: last value, seasonal naive, window mean. Entries that are missing are never used.

In scaled units, like every model; where a variate has no observation in the lookback the forecast is 0, the training
mean under the standard scaler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..windows import WindowBatch

__all__ = ["LastValue", "SeasonalNaive", "WindowMean"]


def last_observed(x: Tensor, mask: Tensor) -> Tensor:
    """Last observed entry along the last axis, (..., l) -> (...); 0 where there is none."""
    steps = torch.arange(1, x.shape[-1] + 1, device=x.device)
    newest = (mask * steps).amax(dim=-1)  # 0: nothing observed
    value = x.gather(-1, (newest - 1).clamp(min=0)[..., None])[..., 0]
    return torch.where(newest > 0, value, 0.0)


class LastValue(nn.Module):
    """Every step of the horizon is the last observed value of the lookback.

    Args:
        lookback: Steps seen, at least 1.
        horizon: Steps forecast.
        n_variates: Not used; every model is built with the same three.
    """

    def __init__(self, lookback: int, horizon: int, n_variates: int) -> None:
        super().__init__()
        self.horizon = horizon

    def forward(self, batch: WindowBatch) -> Tensor:
        """(b, i, lookback) -> (b, i, horizon)."""
        return last_observed(batch.x, batch.x_mask)[..., None].expand(-1, -1, self.horizon).contiguous()


class SeasonalNaive(nn.Module):
    """Each step is the newest observed value of the same phase of the season; the last value if the phase is missing.

    Args:
        lookback: Steps seen, at least `season`.
        horizon: Steps forecast.
        n_variates: Not used.
        season: Season length in steps (24 for the daily season of hourly data).

    Raises:
        ValueError: if `season` is below 1 or longer than the lookback.
    """

    def __init__(self, lookback: int, horizon: int, n_variates: int, *, season: int = 24) -> None:
        super().__init__()
        if not 1 <= season <= lookback:
            raise ValueError(
                f"expected a season of 1 to {lookback} steps (the lookback), got {season}; "
                "pass a lookback of at least one season"
            )
        self.horizon, self.season = horizon, season

    def forward(self, batch: WindowBatch) -> Tensor:
        """(b, i, lookback) -> (b, i, horizon)."""
        whole = batch.x.shape[-1] // self.season * self.season  # the newest whole seasons
        x, mask = (t[..., -whole:].unflatten(-1, (-1, self.season)) for t in (batch.x, batch.x_mask))
        phase = last_observed(x.transpose(-1, -2), mask.transpose(-1, -2))  # (b, i, season)
        fallback = last_observed(batch.x, batch.x_mask)[..., None]
        phase = torch.where(mask.any(dim=-2), phase, fallback)
        steps = torch.arange(self.horizon, device=phase.device) % self.season
        return phase[..., steps]


class WindowMean(nn.Module):
    """Every step of the horizon is the mean of the observed part of the lookback.

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Not used.
    """

    def __init__(self, lookback: int, horizon: int, n_variates: int) -> None:
        super().__init__()
        self.horizon = horizon

    def forward(self, batch: WindowBatch) -> Tensor:
        """(b, i, lookback) -> (b, i, horizon)."""
        total = torch.where(batch.x_mask, batch.x, 0.0).sum(dim=-1, keepdim=True)
        mean = total / batch.x_mask.sum(dim=-1, keepdim=True).clamp(min=1)
        return mean.expand(-1, -1, self.horizon).contiguous()
