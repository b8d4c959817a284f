"""SpaceTime: companion state-space models per variate, the last one closed over its own predictions.

    h_t = A h_{t-1} + B u_t;   next input u_{t+1} = K h_t,   forecast y_{t+1} = C h_t
    behind the lookback h = (A + B K) h, so the forecast of step s is C (A + B K)^{s-1} h_L

Trained on the horizon and, inside the lookback, on one-step predictions of values and of its own inputs.
Zhang, Saab, Poli, Dao, Goel & Ré (2023), "Effectively Modeling Time Series with Simple Discrete State Spaces".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import fft_conv
from ...ssmcore import Stack
from ...ssmcore.mixers import apply_powers, companion_matrix, unit_norm
from .layers import Output, instance_statistics

if TYPE_CHECKING:
    from ..windows import WindowBatch

__all__ = ["ClosedLoop", "SpaceTime"]

LIMIT = 1e4  # largest absolute value of a rollout in normalised units


class ClosedLoop(nn.Module):
    """Companion model per channel that continues a signal by predicting its own inputs.

    Args:
        d_model: Channels.
        d_state: States n per channel.
    """

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        self.a, self.B, self.C, self.K = (
            nn.Parameter(torch.randn(d_model, d_state) * scale) for scale in (1.0, 1.0, d_state**-0.5, 0.01)
        )

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("a", "B")

    def forward(self, u: Tensor, horizon: int) -> tuple[Tensor, Tensor, Tensor]:
        """Continue u (b, l, d).

        Returns:
            Outputs (b, horizon, d) behind the end, and one-step predictions of outputs and of u, each (b, l, d): what
            stands at t was made for t + 1.
        """
        length, u = u.shape[1], u.float()
        A, B = companion_matrix(unit_norm(self.a)), unit_norm(self.B)
        steps = torch.arange(max(length, horizon), device=u.device)
        states = apply_powers(A, B.expand(length, *B.shape), steps[:length])  # (l, d, n), response to an impulse
        with torch.autocast(u.device.type, enabled=False):
            zero = u.new_zeros(u.shape[-1])
            y, inputs = (fft_conv(u, torch.einsum("ldn,dn->dl", states, row), zero)[0] for row in (self.C, self.K))
            last = torch.einsum("bld,ldn->bdn", u, states.flip(0))
            closed = A + B[..., :, None] * self.K[..., None, :]
            readouts = apply_powers(closed.mT, self.C.expand(horizon, *self.C.shape), steps[:horizon])
            return torch.einsum("hdn,bdn->bhd", readouts, last), y, inputs


class SpaceTime(nn.Module):
    """Forecaster of each variate by itself, all with the same weights; beyond its horizon the loop goes on.

    A rollout beyond 10,000 normalised units is clipped there.

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Not used by the weights.
        d_model: Channels.
        d_state: States per channel, the longest autoregression.
        n_layer: Companion blocks before the closed loop.
        dropout: In the blocks.
        weights: Of the losses on one-step predictions of values and of the loop's own inputs, beside 1 for the horizon.
        quantiles: Ascending levels in (0, 1); None forecasts a point.
        distribution: "normal" or "student_t", whose parameters are forecast instead.

    Raises:
        ValueError: if the lookback is too short for the one-step losses, and for a distribution of counts.
    """

    closed_loop = True

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        d_model: int = 32,
        d_state: int = 16,
        n_layer: int = 1,
        dropout: float = 0.1,
        weights: Sequence[float] = (1.0, 1.0),
        quantiles: Sequence[float] | None = None,
        distribution: str | None = None,
    ) -> None:
        super().__init__()
        if lookback < 2:
            raise ValueError(f"expected a lookback of at least 2 steps, got {lookback}")
        self.horizon, self.weights = horizon, tuple(weights)
        self.output = Output(quantiles, distribution)
        if self.output.distribution and self.output.distribution.counts:
            raise ValueError("spacetime feeds its own values back and forecasts no counts; take another model")
        self.skipped = min(d_state, lookback // 2)  # steps before which a prediction knows too little
        self.embed = nn.Linear(5, d_model)
        options = {"d_state": d_state, "dropout": dropout}
        self.stack = Stack(d_model, [{"mixer": "companion", "mlp": True}] * n_layer, mixer_options=options)
        self.loop, self.head = ClosedLoop(d_model, d_state), nn.Linear(d_model, self.output.numbers)

    def forward(self, batch: WindowBatch) -> Tensor:
        """Forecast in the units of `batch.x`: (b, i, horizon), with quantiles or a distribution (b, i, horizon, q)."""
        return self._forecast(batch, self.horizon)[0]

    def forward_train(self, batch: WindowBatch) -> tuple[Tensor, Tensor]:
        """The forecast of `forward`, and the scalar weighted losses of one-step predictions in normalised units."""
        return self._forecast(batch, self.horizon)

    def forward_ahead(self, batch: WindowBatch, horizon: int) -> Tensor:
        """A forecast of any length by going on with the loop, (b, i, horizon[, q])."""
        return self._forecast(batch, horizon)[0]

    def _forecast(self, batch: WindowBatch, horizon: int) -> tuple[Tensor, Tensor]:
        statistics = instance_statistics(batch.x, batch.x_mask)
        x = statistics.normalize(batch.x, batch.x_mask).flatten(0, 1)[..., None]  # (b i, l, 1)
        u = self.stack(self.embed(preprocess(x)))
        ahead, outputs, inputs = self.loop(u, horizon)
        y = self.head(ahead).unflatten(0, batch.x.shape[:2]).clamp(-LIMIT, LIMIT)
        span = slice(self.skipped, -1)
        known = batch.x_mask.flatten(0, 1)[:, self.skipped + 1 :, None]
        value = torch.where(known, self.head(outputs)[:, span, :1] - x[:, self.skipped + 1 :], 0.0)
        own = inputs[:, span] - u[:, self.skipped + 1 :].detach()
        loss = self.weights[0] * value.square().sum() / known.sum().clamp(min=1) + self.weights[1] * own.square().mean()
        return self.output(y, statistics), loss


def preprocess(x: Tensor) -> Tensor:
    """The signal, its differences of order 1 to 3 and its distance from a mean of 4 steps: (b, l, 1) -> (b, l, 5)."""
    parts = [x]
    for _ in range(3):
        parts.append(parts[-1] - F.pad(parts[-1][:, :-1], (0, 0, 1, 0)))
    mean = F.avg_pool1d(F.pad(x.mT, (3, 0), mode="replicate"), 4, stride=1).mT
    return torch.cat([*parts, x - mean], dim=-1)
