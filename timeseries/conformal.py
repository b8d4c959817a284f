"""Split-conformal intervals on top of any point forecaster.

With n absolute residuals of origins that the model has not seen, forecast +- the ceil((n + 1) (1 - alpha))-th smallest
of them covers a new target with probability at least 1 - alpha if old and new residuals are exchangeable (Vovk et al.
2005; Lei et al. 2018). Time series are exchangeable only roughly, and residuals of a validation part by which training
chose its best epoch come out a little small: check the coverage with a backtest on later data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

__all__ = ["check_counts", "conformal_radius", "interval_levels"]


def conformal_radius(residuals: Any, coverage: float, variates: Sequence[str] | None = None) -> Array:
    """Half width of the interval, per variate and step of the horizon.

    Args:
        residuals: target - forecast on held-out origins, (n, i, horizon); NaN where the target is missing.
        coverage: Wanted share of targets inside, 1 - alpha in (0, 1).
        variates: Names for the error message.

    Returns:
        float64 (i, horizon), in the units of the residuals.

    Raises:
        ValueError: if `coverage` is outside (0, 1), or a variate and step have fewer than 1 / alpha residuals.
    """
    scores = np.sort(np.abs(np.asarray(residuals, np.float64)), axis=0)  # NaN goes last
    count = np.isfinite(scores).sum(axis=0)  # (i, horizon)
    check_counts(count, coverage, variates)
    rank = np.ceil(np.round((count + 1) * coverage, 6)).astype(int) - 1
    return np.take_along_axis(scores, rank[None], axis=0)[0]


def check_counts(count: Array, coverage: float, variates: Sequence[str] | None = None) -> None:
    """Refuse a coverage for which there are too few residuals; `count` is that of observed ones, (i, horizon).

    Raises:
        ValueError: as in `conformal_radius`.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"expected an interval coverage inside (0, 1), got {coverage}; e.g. 0.9")
    needed = math.ceil(round(1 / (1 - coverage), 6))
    if count.min() < needed:
        variate, step = np.unravel_index(int(count.argmin()), count.shape)
        name = variates[int(variate)] if variates is not None else f"number {variate}"
        raise ValueError(
            f"a conformal interval of coverage {coverage:g} needs at least {needed} validation residuals, variate "
            f"{name} has {count.min()} at horizon {step + 1}; pass a longer validation part or a smaller coverage"
        )


def interval_levels(coverages: Sequence[float]) -> tuple[float, ...]:
    """Quantile levels of central intervals around the median, ascending: (0.8,) gives (0.1, 0.5, 0.9)."""
    lower = sorted(round((1 - c) / 2, 6) for c in coverages)
    return (*lower, 0.5, *(round(1 - q, 6) for q in reversed(lower)))
