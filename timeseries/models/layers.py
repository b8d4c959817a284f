"""Parts shared by the forecasters: instance normalisation under a mask, and what a head's numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributions import find_distribution

__all__ = [
    "InstanceStatistics",
    "Output",
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


class Output:
    """What the numbers of a head are: a point, quantiles, or the parameters of a distribution.

    Args:
        quantiles: Ascending levels in (0, 1), or None.
        distribution: "normal", "student_t" or "negative_binomial", or None; without quantiles.
        instance_norm: Whether the model normalises each window, as counts need it.

    Attributes:
        numbers: Numbers of a head for each value, the first one of which is a location.
        distribution: The family, or None.

    Raises:
        ValueError: if the two are given together, or counts come without normalisation.
    """

    def __init__(
        self, quantiles: Sequence[float] | None = None, distribution: str | None = None, *, instance_norm: bool = True
    ) -> None:
        self.n_quantiles, self.distribution = len(check_quantiles(quantiles)), find_distribution(distribution)
        if self.distribution and self.n_quantiles:
            raise ValueError(
                "a model has quantiles or a distribution, not both; the quantiles of a distribution are named where it "
                "is trained"
            )
        if self.distribution and self.distribution.counts and not instance_norm:
            raise ValueError(f"{self.distribution.name} needs a model with instance_norm, since counts are not scaled")
        parameters = self.distribution.parameters if self.distribution else ()
        self.numbers = len(parameters) or max(1, self.n_quantiles)

    def __call__(self, raw: Tensor, statistics: InstanceStatistics | None = None) -> Tensor:
        """Forecast in the units of the window from the numbers of the head.

        Args:
            raw: (b, i, horizon, numbers).
            statistics: Those that the window was normalised by, if it was.

        Returns:
            (b, i, horizon) for a point, otherwise (b, i, horizon, q) with ascending quantiles or parameters.
        """
        if self.distribution is not None:
            y = self.distribution.shaped(raw.to(torch.promote_types(raw.dtype, torch.float32)))
            return y if statistics is None else self.distribution.denormalized(y, *statistics)
        y = noncrossing(raw) if self.n_quantiles else raw[..., 0]
        return y if statistics is None else statistics.denormalize(y)


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
