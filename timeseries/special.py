"""Special functions on float64 arrays that numpy lacks: the incomplete beta function, Student's t, and the Normal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.polynomial import chebyshev

Array = npt.NDArray[Any]

__all__ = ["betainc", "erf", "lgamma", "normal_quantile", "student_cdf", "student_quantile"]

NODES = 64  # of the interpolation in 1 / df


def _torch(function: Any, x: Any) -> Array:
    return function(torch.from_numpy(np.array(x, np.float64))).numpy()


def lgamma(x: Any) -> Array:
    """Logarithm of the gamma function."""
    return _torch(torch.lgamma, x)


def erf(x: Any) -> Array:
    """Error function."""
    return _torch(torch.erf, x)


def normal_quantile(level: Any) -> Array:
    """Quantile of the standard Normal."""
    return _torch(torch.special.ndtri, level)


def betainc(a: Any, b: Any, x: Any) -> Array:
    """Regularised incomplete beta function I_x(a, b), from its continued fraction by Lentz's method.

    Args:
        a: Positive.
        b: Positive.
        x: In [0, 1]; all three broadcast.

    Returns:
        float64, relative error below 1e-12 for a and b up to some thousands.
    """
    a, b, x = (np.array(part, np.float64) for part in np.broadcast_arrays(a, b, x))
    # The fraction converges fast on one side of the mean; on the other one 1 - I_{1-x}(b, a) is used.
    swap = x > (a + 1) / (a + b + 2)
    a, b, x = np.where(swap, b, a), np.where(swap, a, b), np.where(swap, 1 - x, x)
    tiny = 1e-300
    with np.errstate(divide="ignore"):
        front = np.exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * np.log(x) + b * np.log1p(-x)) / a
    c, d = np.ones_like(x), 1 - (a + b) * x / (a + 1)
    d = 1 / np.where(np.abs(d) < tiny, tiny, d)
    value = d.copy()
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 + term * d, 1 + term / c
            d, c = 1 / np.where(np.abs(d) < tiny, tiny, d), np.where(np.abs(c) < tiny, tiny, c)
            factor = c * d
            value *= factor
        if (np.abs(factor - 1) < 1e-14).all():
            break
    result = front * value
    return np.where(swap, 1 - result, result)


def student_cdf(z: Any, df: Any) -> Array:
    """P(T <= z) for Student's t with `df` degrees of freedom."""
    z, df = np.asarray(z, np.float64), np.asarray(df, np.float64)
    tail = 0.5 * betainc(df / 2, 0.5, df / (df + z**2))
    return np.where(z > 0, 1 - tail, tail)


def student_quantile(levels: Sequence[float], df: Any) -> Array:
    """Quantiles (..., q) of Student's t with `df` (...) degrees of freedom, at least 2.

    A quantile is smooth in 1 / df in [0, 1/2], so one polynomial per level is exact to about nine digits.
    """
    s = 4 / np.maximum(np.asarray(df, np.float64), 2.0) - 1  # to [-1, 1]
    return np.stack([np.sign(q - 0.5) * chebyshev.chebval(s, _quantile_series(max(q, 1 - q))) for q in levels], axis=-1)


@lru_cache(maxsize=256)
def _quantile_series(level: float) -> tuple[float, ...]:
    """Chebyshev coefficients of the quantile of a level of at least 1/2 in 4 / df - 1."""
    nodes = np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)
    df = 4 / (nodes + 1)
    low, high = np.zeros(NODES), np.ones(NODES)
    while (student_cdf(high, df) < level).any():
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        below = student_cdf(middle, df) < level
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return tuple(chebyshev.chebfit(nodes, (low + high) / 2, NODES - 1))
