"""TSM2: selective mixers along time and along variates by turns, each fed a weighted sum of all earlier outputs.

    input of time mixer l     = sum_{k<l} alpha_lk yT_k + beta_lk yV_k
    input of variate mixer l  = sum_{k<=l} theta_lk yT_k + sum_{k<l} gamma_lk yV_k,        yT_0 = yV_0 = x

Weights start at 1 for the newest output and 0 elsewhere. Behrouz, Santacatterina & Zabih (2024), "MambaMixer".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ssmcore import create_mixer
from .layers import Output, instance_statistics

if TYPE_CHECKING:
    from ..windows import WindowBatch

__all__ = ["TSM2"]


class TSM2(nn.Module):
    """Forecaster on a grid of patches, mixed along time (Mamba, causal) and along variates (Mamba both ways).

    Args:
        lookback: Steps seen.
        horizon: Steps forecast.
        n_variates: Number of variates; the weights take any.
        d_model: Width of a token.
        d_state: States of the Mambas.
        n_layer: Pairs of mixers.
        patch_len: Steps in a patch.
        stride: Steps between the starts of neighbouring patches.
        dropout: Before the head.
        quantiles: Ascending levels in (0, 1); None forecasts a point.
        distribution: "normal", "student_t" or "negative_binomial" (for counts), whose parameters are forecast instead.

    Raises:
        ValueError: if the lookback is shorter than a patch.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        n_variates: int,
        *,
        d_model: int = 32,
        d_state: int = 8,
        n_layer: int = 2,
        patch_len: int = 16,
        stride: int = 8,
        dropout: float = 0.1,
        quantiles: Sequence[float] | None = None,
        distribution: str | None = None,
    ) -> None:
        super().__init__()
        if lookback < patch_len:
            raise ValueError(
                f"a patch of patch_len={patch_len} steps is longer than the lookback of {lookback}; lower patch_len"
            )
        self.horizon, self.patch_len, self.stride = horizon, patch_len, stride
        self.output = Output(quantiles, distribution)
        tokens = (lookback - patch_len) // stride + 2
        self.embed = nn.Linear(patch_len, d_model)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, d_model))
        options = {"d_state": d_state, "expand": 1}
        self.time = nn.ModuleList(_Gated(d_model, "mamba", **options) for _ in range(n_layer))
        self.variate = nn.ModuleList(
            _Gated(d_model, "bidirectional", mixer="mamba", mixer_options=options) for _ in range(n_layer)
        )
        # Layer l reads its l + 1 time outputs (one more for the variate mixer), then its l + 1 variate outputs.
        self.to_time = nn.ParameterList(_newest(2 * n + 2, 2 * n + 1) for n in range(n_layer))
        self.to_variate = nn.ParameterList(_newest(2 * n + 3, n + 1) for n in range(n_layer))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(tokens * d_model, horizon * self.output.numbers)

    def forward(self, batch: WindowBatch) -> Tensor:
        """Forecast in the units of `batch.x`: (b, i, horizon), with quantiles or a distribution (b, i, horizon, q)."""
        statistics = instance_statistics(batch.x, batch.x_mask)
        x = statistics.normalize(batch.x, batch.x_mask)
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], self.stride)], dim=-1)
        hidden = self.embed(x.unfold(-1, self.patch_len, self.stride)) + self.position  # (b, i, j, d)
        times, variates = [hidden], [hidden]
        for layer, (time, variate) in enumerate(zip(self.time, self.variate)):
            mixed = _sum([*times, *variates], self.to_time[layer])
            times.append(time(mixed))
            mixed = _sum([*times, *variates], self.to_variate[layer])
            variates.append(variate(mixed.transpose(1, 2)).transpose(1, 2))
        y = self.head(self.dropout(variates[-1].flatten(2))).unflatten(-1, (self.horizon, -1))
        return self.output(y, statistics)


class _Gated(nn.Module):
    """Residual of a mixer along the third axis, gated by an MLP branch; norm over that axis and features together."""

    def __init__(self, d_model: int, name: str, **options: object) -> None:
        super().__init__()
        self.mixer = create_mixer(name, d_model, **options)
        self.gate = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(b, rows, positions, d)."""
        h = F.layer_norm(x, x.shape[-2:]).flatten(0, 1)
        return x + (self.mixer(h) * F.silu(self.gate(h))).unflatten(0, x.shape[:2])


def _newest(count: int, place: int) -> nn.Parameter:
    weights = torch.zeros(count)
    weights[place] = 1.0
    return nn.Parameter(weights)


def _sum(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    return torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(0)
