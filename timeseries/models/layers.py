"""Parts shared by the forecasters: instance normalisation under a mask, and non-crossing quantiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "InstanceStatistics",
    "check_quantiles",
    "instance_statistics",
    "interpolate",
    "middle_quantile",
    "noncrossing",
]


class InstanceStatistics(NamedTuple):
    """Mean and scale per window and variate, each (b, i, 1), without gradient."""

    mean: Tensor
    scale: Tensor

    def normalize(self, x: Tensor, mask: Tensor) -> Tensor:
        """(b, i, l) to zero mean and unit scale; entries that are not observed become 0."""
        return torch.where(mask, (x - self.mean) / self.scale, 0.0)

    def denormalize(self, y: Tensor) -> Tensor:
        """Undo `normalize` on (b, i, horizon) or (b, i, horizon, q)."""
        mean, scale = (self.mean, self.scale) if y.dim() == 3 else (self.mean[..., None], self.scale[..., None])
        return y * scale + mean


def instance_statistics(x: Tensor, mask: Tensor, eps: float = 1e-5) -> InstanceStatistics:
    """Statistics of the observed part of each window.

    Args:
        x: Window (b, i, l), finite.
        mask: (b, i, l), True where observed.
        eps: Added to the biased variance: a constant window has scale sqrt(eps).

    Returns:
        Mean and scale (b, i, 1); mean 0 and scale 1 where nothing is observed.
    """
    x = x.detach()
    count = mask.sum(dim=-1, keepdim=True)
    mean = torch.where(mask, x, 0.0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    variance = torch.where(mask, x - mean, 0.0).square().sum(dim=-1, keepdim=True) / count.clamp(min=1)
    return InstanceStatistics(mean, torch.where(count > 0, (variance + eps).sqrt(), 1.0))


def check_quantiles(quantiles: Sequence[float] | None) -> tuple[float, ...]:
    """Levels as a tuple of floats, empty for a point forecast.

    Raises:
        ValueError: if the levels are not strictly ascending inside (0, 1).
    """
    levels = tuple(float(q) for q in quantiles or ())
    if any(not 0 < q < 1 for q in levels) or list(levels) != sorted(set(levels)):
        raise ValueError(f"expected quantile levels ascending inside (0, 1), got {list(levels)}; e.g. [0.1, 0.5, 0.9]")
    return levels


def middle_quantile(levels: Sequence[float]) -> int:
    """Position of the level nearest to the median, which serves as the point forecast."""
    return min(range(len(levels)), key=lambda k: abs(levels[k] - 0.5))


def noncrossing(raw: Tensor) -> Tensor:
    """Ascending quantiles from free numbers (..., q): the first one, plus the cumulative softplus of the others."""
    return torch.cat([raw[..., :1], raw[..., :1] + F.softplus(raw[..., 1:]).cumsum(dim=-1)], dim=-1)


def interpolate(x: Tensor, mask: Tensor) -> Tensor:
    """Straight lines between observed neighbours along the last axis, the nearest one beyond the ends, 0 without any.

    Args:
        x: (..., l), finite.
        mask: (..., l), True where observed.
    """
    length = x.shape[-1]
    steps = torch.arange(length, device=x.device).expand_as(x)
    before = torch.where(mask, steps, -1).cummax(dim=-1).values
    after = length - 1 - torch.where(mask.flip(-1), steps, -1).cummax(dim=-1).values.flip(-1)  # length: none behind
    first, last = torch.where(before < 0, after, before), torch.where(after == length, before, after)
    left, right = (x.gather(-1, place.clamp(0, length - 1)) for place in (first, last))
    share = (steps - first).to(x.dtype) / (last - first).clamp(min=1)
    return torch.where(mask.any(dim=-1, keepdim=True), left + share * (right - left), 0.0)
