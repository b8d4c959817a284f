"""Distributions that a forecaster may have for each value: Normal, Student's t, and the negative binomial for counts.

A network gives free numbers; `shaped` turns them into parameters in the units of its normalised window, `denormalized`
into those of the scaler, `in_units` into those of the data. All three maps are exact, since the first two families are
closed under shifts and scales and counts are never scaled. Densities are computed in torch, with gradients; quantiles,
samples and scores of finished forecasts in numpy.

Gneiting & Raftery (2007) for the continuous ranked probability score (CRPS), Jordan, Krüger & Lerch (2019) for its
closed form of Student's t; Salinas et al. (2020), "DeepAR", for the scale of counts.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .special import betainc, erf, lgamma, normal_quantile, student_cdf, student_quantile

Array = npt.NDArray[Any]

__all__ = [
    "DEFAULT_LEVELS",
    "DISTRIBUTIONS",
    "Distribution",
    "NegativeBinomial",
    "Normal",
    "StudentT",
    "find_distribution",
]

DEFAULT_LEVELS = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)  # of the quantiles in a forecast file
FLOOR = 1e-3  # least scale in normalised units, and least dispersion
DRAWS = 256  # for a CRPS without closed form
BLOCK = 1 << 20  # draws held at a time


class Distribution(ABC):
    """One family. Parameters stand on the last axis, the location or mean first.

    Attributes:
        name: How it is called.
        parameters: Names of the parameters, as a forecast file has them.
        counts: Whether it is one of whole numbers, which are not scaled.
    """

    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]
    counts: ClassVar[bool] = False

    @abstractmethod
    def shaped(self, raw: Tensor) -> Tensor:
        """Parameters (..., p) in normalised units from free numbers (..., p)."""

    @abstractmethod
    def denormalized(self, y: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """Parameters (b, i, h, p) of the window as it was before its `mean` and `scale` (b, i, 1) were taken out."""

    @abstractmethod
    def log_prob(self, y: Tensor, target: Tensor) -> Tensor:
        """Log density, or log probability of a count, of targets (...) under parameters (..., p)."""

    @abstractmethod
    def log_mode(self, y: Tensor) -> Tensor:
        """Log density of the likeliest value."""

    @abstractmethod
    def in_units(self, y: Array, center: Array, scale: Array) -> Array:
        """Parameters of center + scale * X; center and scale broadcast against (...)."""

    @abstractmethod
    def quantiles(self, y: Array, levels: Sequence[float]) -> Array:
        """Quantiles (..., q) of parameters (..., p), float64."""

    @abstractmethod
    def sample(self, y: Array, count: int, rng: np.random.Generator) -> Array:
        """Independent draws (..., count) of parameters (..., p)."""

    @abstractmethod
    def crps(self, y: Array, target: Array) -> Array:
        """Continuous ranked probability score of each target, in its units; lower is better."""

    def deviance(self, y: Tensor, target: Tensor) -> Tensor:
        """Twice the log of how much likelier the likeliest value was; 0 there, z^2 for the Normal."""
        return 2 * (self.log_mode(y) - self.log_prob(y, target)).clamp(min=0)


class Normal(Distribution):
    """N(mean, scale^2)."""

    name: ClassVar[str] = "normal"
    parameters: ClassVar[tuple[str, ...]] = ("mean", "scale")

    def shaped(self, raw: Tensor) -> Tensor:
        return torch.cat([raw[..., :1], F.softplus(raw[..., 1:2]) + FLOOR], dim=-1)

    def denormalized(self, y: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        mean, scale = mean[..., None], scale[..., None]
        return torch.cat([y[..., :1] * scale + mean, y[..., 1:2] * scale, y[..., 2:]], dim=-1)

    def log_prob(self, y: Tensor, target: Tensor) -> Tensor:
        return self.log_mode(y) - 0.5 * ((target - y[..., 0]) / y[..., 1]).square()

    def log_mode(self, y: Tensor) -> Tensor:
        return -y[..., 1].log() - 0.5 * math.log(2 * math.pi)

    def in_units(self, y: Array, center: Array, scale: Array) -> Array:
        y = np.asarray(y, np.float64)
        parts = [y[..., 0] * scale + center, y[..., 1] * scale]
        return np.stack([*parts, *np.moveaxis(y[..., 2:], -1, 0)], axis=-1)

    def quantiles(self, y: Array, levels: Sequence[float]) -> Array:
        y = np.asarray(y, np.float64)
        return y[..., :1] + y[..., 1:2] * normal_quantile(np.asarray(levels, np.float64))

    def sample(self, y: Array, count: int, rng: np.random.Generator) -> Array:
        return y[..., :1] + y[..., 1:2] * rng.standard_normal((*y.shape[:-1], count))

    def crps(self, y: Array, target: Array) -> Array:
        y = np.asarray(y, np.float64)
        z = (np.asarray(target, np.float64) - y[..., 0]) / y[..., 1]
        density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        return y[..., 1] * (z * erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))


class StudentT(Normal):
    """mean + scale * t with `df` degrees of freedom, above 2 so that the variance exists."""

    name: ClassVar[str] = "student_t"
    parameters: ClassVar[tuple[str, ...]] = ("mean", "scale", "df")

    def shaped(self, raw: Tensor) -> Tensor:
        return torch.cat([super().shaped(raw), 2 + F.softplus(raw[..., 2:3])], dim=-1)

    def log_prob(self, y: Tensor, target: Tensor) -> Tensor:
        df = y[..., 2]
        z = (target - y[..., 0]) / y[..., 1]
        return self.log_mode(y) - 0.5 * (df + 1) * torch.log1p(z.square() / df)

    def log_mode(self, y: Tensor) -> Tensor:
        df = y[..., 2]
        return torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (df * math.pi).log() - y[..., 1].log()

    def quantiles(self, y: Array, levels: Sequence[float]) -> Array:
        y = np.asarray(y, np.float64)
        return y[..., :1] + y[..., 1:2] * student_quantile(levels, y[..., 2])

    def sample(self, y: Array, count: int, rng: np.random.Generator) -> Array:
        y = np.asarray(y, np.float64)
        return y[..., :1] + y[..., 1:2] * rng.standard_t(np.broadcast_to(y[..., 2:3], (*y.shape[:-1], count)))

    def crps(self, y: Array, target: Array) -> Array:
        location, scale, df = np.moveaxis(np.asarray(y, np.float64), -1, 0)
        z = (np.asarray(target, np.float64) - location) / scale
        density = np.exp(
            lgamma((df + 1) / 2) - lgamma(df / 2) - 0.5 * np.log(df * np.pi) - 0.5 * (df + 1) * np.log1p(z**2 / df)
        )
        # B(1/2, df - 1/2) / B(1/2, df / 2)^2, by logarithms
        log_beta = lgamma(df - 0.5) - lgamma(df) + 2 * (lgamma((df + 1) / 2) - lgamma(df / 2)) - 0.5 * math.log(math.pi)
        spread = 2 * np.sqrt(df) / (df - 1) * np.exp(log_beta)
        return scale * (z * (2 * student_cdf(z, df) - 1) + 2 * density * (df + z**2) / (df - 1) - spread)


class NegativeBinomial(Distribution):
    """Counts with variance mean + dispersion * mean^2.

    Counts keep their units. A network reads them normalised; its mean is a softplus times 1 + the mean of the window.
    """

    name: ClassVar[str] = "negative_binomial"
    parameters: ClassVar[tuple[str, ...]] = ("mean", "dispersion")
    counts: ClassVar[bool] = True

    def shaped(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) + FLOOR

    def denormalized(self, y: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        return torch.cat([y[..., :1] * (1 + mean.clamp(min=0))[..., None], y[..., 1:]], dim=-1)

    def log_prob(self, y: Tensor, target: Tensor) -> Tensor:
        mean, shape = y[..., 0], 1 / y[..., 1]
        target = target.clamp(min=0)
        counted = torch.lgamma(target + shape) - torch.lgamma(shape) - torch.lgamma(target + 1)
        return counted - shape * torch.log1p(mean / shape) + target * (mean.log() - (shape + mean).log())

    def log_mode(self, y: Tensor) -> Tensor:
        return self.log_prob(y, ((1 - y[..., 1]) * y[..., 0]).floor().clamp(min=0))

    def in_units(self, y: Array, center: Array, scale: Array) -> Array:
        if np.any(center != 0) or np.any(scale != 1):
            raise ValueError("a negative binomial forecast has no other units than counts; train with scaler: none")
        return np.asarray(y, np.float64)

    def _below(self, y: Array, count: Array) -> Array:
        """P(X <= count) for whole counts (...)."""
        mean, dispersion = y[..., 0], y[..., 1]
        chance = betainc(1 / dispersion, np.maximum(count, 0) + 1, 1 / (1 + dispersion * mean))
        return np.where(count < 0, 0.0, chance)

    def quantiles(self, y: Array, levels: Sequence[float]) -> Array:
        y = np.asarray(y, np.float64)
        spread = np.sqrt(y[..., 0] * (1 + y[..., 1] * y[..., 0]))
        found = []
        for level in levels:
            low = np.full(y.shape[:-1], -1.0)  # P(X <= low) < level <= P(X <= high)
            high = np.ceil(y[..., 0] + spread * math.sqrt(level / (1 - level)))  # Cantelli's inequality
            while (high - low > 1).any():
                middle = np.floor((low + high) / 2)
                enough = self._below(y, middle) >= level
                low, high = np.where(enough, low, middle), np.where(enough, middle, high)
            found.append(high)
        return np.stack(found, axis=-1)

    def sample(self, y: Array, count: int, rng: np.random.Generator) -> Array:
        y = np.asarray(y, np.float64)
        shape = np.broadcast_to(1 / y[..., 1:2], (*y.shape[:-1], count))
        return rng.negative_binomial(shape, 1 / (1 + y[..., 1:2] * y[..., :1])).astype(np.float64)

    def crps(self, y: Array, target: Array) -> Array:
        """Estimated without bias from 256 seeded draws for each target."""
        y, target = np.asarray(y, np.float64), np.asarray(target, np.float64)
        flat, wanted = y.reshape(-1, 2), target.reshape(-1)
        rng, found = np.random.default_rng(0), np.empty(len(flat))
        weight = (2 * np.arange(DRAWS) - DRAWS + 1) / (DRAWS * (DRAWS - 1))
        for start in range(0, len(flat), BLOCK // DRAWS):
            some = slice(start, start + BLOCK // DRAWS)
            drawn = np.sort(self.sample(flat[some], DRAWS, rng), axis=-1)
            found[some] = np.abs(drawn - wanted[some, None]).mean(-1) - drawn @ weight
        return found.reshape(target.shape)


DISTRIBUTIONS: dict[str, Distribution] = {each.name: each for each in (Normal(), StudentT(), NegativeBinomial())}


def find_distribution(name: str | None) -> Distribution | None:
    """A family by name; None for none.

    Raises:
        ValueError: for an unknown name, with a close one.
    """
    if name is None:
        return None
    if name not in DISTRIBUTIONS:
        close = difflib.get_close_matches(str(name), DISTRIBUTIONS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(DISTRIBUTIONS)}"
        raise ValueError(f"unknown distribution {name!r}; {hint}")
    return DISTRIBUTIONS[name]
