"""Small learnable series without files: for tests, smoke runs and examples.

sines         sums of two seasons with random phases, plus AR(1) noise
lagged_graph  variate 0 is AR(1) noise; variate k + 1 repeats variate k after a lag, so only mixing variates helps
blackout      sines whose high values go missing more often
spikes        sines with labelled spikes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from ..frames import from_numpy
from .base import ForecastingData

Kind = Literal["sines", "lagged_graph", "blackout", "spikes"]
SEASONS = (24, 168)  # hours: a day and a week


def sines(length: int, n_variates: int, noise: float, rng: np.random.Generator) -> xr.Dataset:
    """Two seasons of random size and phase for each variate, plus AR(1) noise with coefficient 0.7."""
    t = np.arange(length)[:, None]
    values = noise * _ar1(length, n_variates, 0.7, rng)
    for season in SEASONS:
        size, phase = rng.uniform(0.5, 1.5, n_variates), rng.uniform(0, 2 * np.pi, n_variates)
        values += size * np.sin(2 * np.pi * t / season + phase)
    return _hourly(values)


def lagged_graph(length: int, n_variates: int, noise: float, rng: np.random.Generator, lag: int = 24) -> xr.Dataset:
    """A chain of variates: each repeats its predecessor `lag` steps later, plus white noise."""
    values = np.empty((length + lag * n_variates, n_variates))
    values[:, 0] = _ar1(len(values), 1, 0.9, rng)[:, 0]
    for k in range(1, n_variates):
        values[:, k] = np.roll(values[:, k - 1], lag) + noise * rng.standard_normal(len(values))
    return _hourly(values[lag * n_variates :])  # what rolled over the beginning is cut off


def blackout(length: int, n_variates: int, noise: float, rng: np.random.Generator) -> xr.Dataset:
    """Sines of which a value goes missing with probability 0.6 / (1 + exp(-3 z)), z the standardised value.

    The variable `truth` holds what was there.
    """
    ds = sines(length, n_variates, noise, rng)
    values = ds["target"].to_numpy()
    z = (values - values.mean(axis=0)) / values.std(axis=0)
    missing = rng.random(values.shape) < 0.6 / (1 + np.exp(-3 * z))
    return ds.assign(target=ds["target"].where(~missing), truth=ds["target"])


def spikes(length: int, n_variates: int, noise: float, rng: np.random.Generator) -> xr.Dataset:
    """Sines with a spike of 3 to 6 standard deviations at one step in 200 of each variate, flagged by `label`."""
    ds = sines(length, n_variates, noise, rng)
    values = ds["target"].to_numpy()
    label = rng.random(values.shape) < 1 / 200
    size = rng.uniform(3, 6, values.shape) * rng.choice([-1, 1], values.shape) * values.std(axis=0)
    spiked = np.where(label, values + size, values).astype(np.float32)
    return ds.assign(target=ds["target"].copy(data=spiked), label=(("time", "variate"), label))


KINDS: dict[str, Callable[..., xr.Dataset]] = {
    "sines": sines,
    "lagged_graph": lagged_graph,
    "blackout": blackout,
    "spikes": spikes,
}


def create_synthetic(
    kind: str = "sines", length: int = 2000, n_variates: int = 4, noise: float = 0.1, seed: int = 0
) -> xr.Dataset:
    """A synthetic Dataset by name, the same for the same seed; hours from 2020-01-01.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown synthetic set {kind!r}; expected one of {', '.join(KINDS)}.")
    return KINDS[kind](length, n_variates, noise, np.random.default_rng(seed))


class Synthetic(ForecastingData):
    """A synthetic set.

    Args:
        kind: "sines", "lagged_graph", "blackout" or "spikes".
        length: Hours.
        variate_count: Number of variates.
        noise: Standard deviation of the innovations.
        data_seed: Seed of the series; `seed` is that of the training order.
        lookback: As in `ForecastingData`.
        horizon: As in `ForecastingData`.
        options: Further arguments of `ForecastingData`.
    """

    def __init__(
        self,
        kind: Kind = "sines",
        length: int = 2000,
        variate_count: int = 4,
        noise: float = 0.1,
        data_seed: int = 0,
        lookback: int = 48,
        horizon: int = 24,
        **options: Any,
    ) -> None:
        super().__init__(lookback=lookback, horizon=horizon, **options)
        if kind not in KINDS:
            raise ValueError(f"Unknown synthetic set {kind!r}; expected one of {', '.join(KINDS)}.")
        self.kind, self.length, self.variate_count = kind, length, variate_count
        self.noise, self.data_seed = noise, data_seed

    def read(self) -> xr.Dataset:
        """The generated series."""
        return create_synthetic(self.kind, self.length, self.variate_count, self.noise, self.data_seed)


def _ar1(length: int, width: int, coefficient: float, rng: np.random.Generator) -> np.ndarray:
    """Stationary AR(1) with unit innovations, (length, width)."""
    values = rng.standard_normal((length, width))
    values[0] /= np.sqrt(1 - coefficient**2)
    for t in range(1, length):
        values[t] += coefficient * values[t - 1]
    return values


def _hourly(values: np.ndarray) -> xr.Dataset:
    names = [f"x{k}" for k in range(values.shape[1])]
    times = pd.date_range("2020-01-01", periods=len(values), freq="h").to_numpy()
    return from_numpy(values, times=times, variates=names, freq="h")
