"""Linear forecasters: RLinear, DLinear, and ridge regression in closed form.

RLinear (Li et al. 2023, "Revisiting Long-term Time Series Forecasting") is instance normalisation and one linear map
from lookback to horizon. DLinear (Zeng et al. 2023) adds the maps of a moving average and of the rest. Ridge solves the
normal equations of the training windows from Gram matrices that are summed batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import InstanceStatistics, Output, instance_statistics

if TYPE_CHECKING:
    from ..windows import WindowBatch, Windows

__all__ = ["DLinear", "RLinear", "Ridge"]


class RLinear(nn.Module):
    """Instance normalisation, one linear map shared by all variates, and back.

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Not used; the map is shared.
        quantiles: Levels to forecast; None forecasts a point.
        distribution: "normal", "student_t" or "negative_binomial" (for counts), whose parameters are forecast instead.
        instance_norm: False uses the global scaler only.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        quantiles: Sequence[float] | None = None,
        distribution: str | None = None,
        instance_norm: bool = True,
    ) -> None:
        super().__init__()
        self.instance_norm = instance_norm
        self.output = Output(quantiles, distribution, instance_norm=instance_norm)
        self.linear = nn.Linear(lookback, horizon * self.output.numbers)

    def forward(self, batch: WindowBatch) -> Tensor:
        """(b, i, lookback) -> (b, i, horizon), or (b, i, horizon, q) with quantiles or a distribution."""
        statistics = instance_statistics(batch.x, batch.x_mask) if self.instance_norm else None
        x = batch.x if statistics is None else statistics.normalize(batch.x, batch.x_mask)
        return self.output(self.linear(x).unflatten(-1, (-1, self.output.numbers)), statistics)


class DLinear(nn.Module):
    """Moving average and remainder, one linear map each, shared by all variates; no normalisation.

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Not used; the maps are shared.
        window: Odd width of the moving average in steps; the ends are replicated.
        quantiles: Levels to forecast; None forecasts a point.
        distribution: "normal" or "student_t", whose parameters are forecast instead.

    Raises:
        ValueError: if `window` is even or below 1.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        window: int = 25,
        quantiles: Sequence[float] | None = None,
        distribution: str | None = None,
    ) -> None:
        super().__init__()
        if window < 1 or window % 2 == 0:
            raise ValueError(f"expected an odd moving-average window of at least 1 step, got {window}; e.g. 25")
        self.window = window
        self.output = Output(quantiles, distribution, instance_norm=False)
        self.trend, self.rest = nn.Linear(lookback, horizon), nn.Linear(lookback, horizon * self.output.numbers)
        nn.init.constant_(self.trend.weight, 1 / lookback)
        nn.init.constant_(self.rest.weight, 1 / lookback)

    def forward(self, batch: WindowBatch) -> Tensor:
        """(b, i, lookback) -> (b, i, horizon), or (b, i, horizon, q) with quantiles or a distribution."""
        side = self.window // 2
        trend = F.avg_pool1d(F.pad(batch.x, (side, side), mode="replicate"), self.window, stride=1)
        raw = self.rest(batch.x - trend).unflatten(-1, (-1, self.output.numbers))
        located = raw[..., :1] + self.trend(trend)[..., None]  # the other numbers are scales, or counted from this one
        return self.output(torch.cat([located, raw[..., 1:]], dim=-1))


class Ridge(nn.Module):
    """Ridge regression from the lookback to every step of the horizon, solved in closed form.

    The windows enter as one sum of X^T X and X^T Y per target variate, in float64; windows whose target is not fully
    observed are left out for that variate. The intercept is not penalised.

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Number of variates.
        variates: "own": each variate from its own past with its own map. "shared": from its own past, one map for all.
            "all": each variate from the past of all.
        alpha: Penalty on the squared weights, relative to the number of windows (scaled units); not negative.
        instance_norm: Normalise each window by its own mean and scale first, and undo it on the forecast; the squared
            error is that of the forecast in scaled units.
        steps: Use only this many newest steps of the lookback; None uses all.

    Raises:
        ValueError: if `steps` exceeds the lookback, `alpha` is negative, or the regression would have more than 8192
            inputs.
    """

    MAX_INPUTS = 8192  # the Gram matrix then takes 0.5 GB

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        variates: Literal["own", "shared", "all"] = "own",
        alpha: float = 1e-3,
        instance_norm: bool = False,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        if variates not in ("own", "shared", "all"):
            raise ValueError(f'expected variates "own", "shared" or "all", got {variates!r}')
        if not alpha >= 0:
            raise ValueError(f"expected alpha, the penalty, of at least 0, got {alpha}; e.g. 1e-3")
        if steps is not None and not 1 <= steps <= lookback:
            raise ValueError(f"expected steps from 1 to {lookback} (the lookback), got {steps}")
        self.variates, self.alpha, self.instance_norm = variates, alpha, instance_norm
        self.steps = steps or lookback
        self.n_inputs = self.steps * (n_variates if variates == "all" else 1)
        if self.n_inputs > self.MAX_INPUTS:
            raise ValueError(
                f"ridge over {n_variates} variates of {self.steps} steps has {self.n_inputs} inputs, the limit is "
                f'{self.MAX_INPUTS}; pass variates="own" or fewer steps'
            )
        maps = 1 if variates == "shared" else n_variates
        self.register_buffer("weight", torch.zeros(maps, horizon, self.n_inputs))
        self.register_buffer("bias", torch.zeros(maps, horizon))

    def fit_windows(self, windows: Windows, batch_size: int = 512) -> None:
        """Solve for the weights on the training windows (scaled units).

        Raises:
            ValueError: if a variate has no window with a fully observed target, or the inputs do not determine the
                weights without a penalty.
        """
        self.fit_batches(windows.batches(batch_size))

    @torch.no_grad()
    def fit_batches(self, batches: Iterable[WindowBatch]) -> None:
        """Like `fit_windows`, on any source of batches."""
        maps, horizon, inputs = self.weight.shape
        size = inputs + 1
        gram = torch.zeros(maps, size, size, dtype=torch.float64)
        moment = torch.zeros(maps, size, horizon, dtype=torch.float64)
        count = torch.zeros(maps, dtype=torch.float64)
        for batch in batches:
            features, statistics = self._features(batch)
            y = batch.y if statistics is None else statistics.normalize(batch.y, batch.y_mask)
            features = F.pad(features, (0, 1), value=1.0).double()  # the constant comes last
            if statistics is not None:  # errors count in the units of the scaler, not in those of each window
                features, y = features * statistics.scale, y * statistics.scale
            complete = batch.y_mask.all(dim=-1) & batch.x_mask.any(dim=-1)  # (b, i)
            for k, keep in enumerate([complete] if self.variates == "shared" else complete.unbind(dim=1)):
                rows = features[keep] if self.variates == "shared" else features[keep, k]
                target = y[keep] if self.variates == "shared" else y[keep, k]
                count[k] += len(rows)
                gram[k] += rows.T @ rows
                moment[k] += rows.T @ target.double()
        if (count == 0).any():
            empty = torch.nonzero(count == 0).flatten().tolist()
            raise ValueError(
                f"ridge found no training window with a fully observed target for variate {empty[0]} (of {maps}); "
                "drop the variate or pass more data"
            )
        penalty = torch.diag(torch.cat([torch.ones(inputs), torch.zeros(1)]).double())
        try:
            solution = torch.linalg.solve(gram + self.alpha * count[:, None, None] * penalty, moment)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                "ridge cannot be solved: a variate is constant or has too few windows; pass a larger alpha, now "
                f"{self.alpha:g}, e.g. 1e-3"
            ) from error
        self.weight.copy_(solution[:, :-1].transpose(1, 2))
        self.bias.copy_(solution[:, -1])

    def _features(self, batch: WindowBatch) -> tuple[Tensor, InstanceStatistics | None]:
        """Inputs per target variate (b, i, n_inputs), and the statistics of the window."""
        x, statistics = batch.x, None
        if self.instance_norm:
            statistics = instance_statistics(batch.x, batch.x_mask)
            x = statistics.normalize(batch.x, batch.x_mask)
        x = x[..., -self.steps :]
        if self.variates == "all":
            x = x.flatten(1)[:, None].expand(-1, x.shape[1], -1)
        return x, statistics

    def forward(self, batch: WindowBatch) -> Tensor:
        """(b, i, lookback) -> (b, i, horizon)."""
        features, statistics = self._features(batch)
        if self.variates == "shared":
            y = features @ self.weight[0].T + self.bias[0]
        else:
            y = torch.einsum("bif,ihf->bih", features, self.weight) + self.bias
        return y if statistics is None else statistics.denormalize(y)
