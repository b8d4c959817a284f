"""Linear-Gaussian state-space model of gappy series: Kalman filter, smoother and EM; gaps may depend on the level.

    z_t = A z_{t-1} + w_t,  w ~ N(0, Q),      x_t = C z_t + d + v_t,  v ~ N(0, diag R),      z_0 ~ N(m0, P0)

"mar": missing entries are left out of the update. "mnar": that an entry is missing is an observation too,

    P(m_ti = 1 | z_t) = sigmoid(phi_i z_t + c_i),      m = 1 for missing,

which enters as a Gaussian at the mode given the prediction: with p the sigmoid there, gradient (m - p) phi and negative
Hessian p (1 - p) phi phi^T. (One Newton step from the predicted mean, as published, overshoots where p is near 0 or 1.)
Entries that go missing in blocks tell less than as many that go one by one: each counts by how many of them start one.
Everything in float64; covariances in Joseph form, symmetrised at each step.
Shumway & Stoffer (1982) for EM; Sunesh, Ma & Nilol (2026), "Modeling Information Blackouts in Missing Not-At-Random
Time Series Data", for the observed mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr

from .schema import canonical

Array = npt.NDArray[np.float64]
Missing = Literal["mar", "mnar"]

__all__ = ["Filtered", "LinearGaussian", "Smoothed", "kalman_impute"]


class Filtered(NamedTuple):
    """What the filter knows: predicted and filtered means (t, n) and covariances (t, n, n), and log p of the values."""

    predicted_mean: Array
    predicted_cov: Array
    mean: Array
    cov: Array
    log_likelihood: float


class Smoothed(NamedTuple):
    """Means (t, n), covariances (t, n, n), and covariances of z_t with z_{t-1} (t, n, n), 0 at the first step."""

    mean: Array
    cov: Array
    cross: Array


@dataclass(frozen=True)
class LinearGaussian:
    """Parameters of the model; `create` starts them and `fit` finds them.

    Attributes:
        A: (n, n). Q: (n, n). C: (v, n). d: (v,). R: (v,). m0: (n,). P0: (n, n).
        phi: (v, n) and c: (v,), how missing depends on the state; None with "mar".
    """

    A: Array
    Q: Array
    C: Array
    d: Array
    R: Array
    m0: Array
    P0: Array
    phi: Array | None = None
    c: Array | None = None

    @classmethod
    def create(cls, x: Any, d_state: int, missing: Missing = "mar", seed: int = 0) -> LinearGaussian:
        """Start values from principal components of the series with gaps filled by straight lines.

        Args:
            x: Series (t, v), NaN where missing.
            d_state: State size n, at most the number of variates times two.
            missing: "mar" or "mnar".
            seed: Of the small random part.

        Raises:
            ValueError: if an option is unknown or out of range, or a variate has no value.
        """
        x = np.asarray(x, np.float64)
        if missing not in ("mar", "mnar"):
            raise ValueError(f"missing must be 'mar' or 'mnar', got {missing!r}")
        if d_state < 1:
            raise ValueError(f"expected a state of at least 1, got d_state={d_state}")
        if x.ndim != 2 or len(x) < 3:
            raise ValueError(f"a state-space model needs a series (t, v) of at least 3 steps, got shape {x.shape}")
        empty = np.isnan(x).all(axis=0)
        if empty.any():
            raise ValueError(f"variate {int(empty.argmax())} has no observed value; leave it out")
        rng = np.random.default_rng(seed)
        d = np.nanmean(x, axis=0)
        filled = _lines(x) - d
        lagged = np.concatenate([filled[1:], filled[:-1]], axis=1)  # two steps, so that a state may hold a velocity
        directions = np.linalg.svd(lagged, full_matrices=False)[2][:d_state]
        states = lagged @ directions.T
        if states.shape[1] < d_state:
            states = np.hstack([states, 0.1 * rng.standard_normal((len(states), d_state - states.shape[1]))])
        A = np.linalg.lstsq(states[:-1], states[1:], rcond=None)[0].T
        A *= min(1.0, 0.99 / max(1e-12, np.abs(np.linalg.eigvals(A)).max()))
        C = np.linalg.lstsq(states, filled[1:], rcond=None)[0].T
        Q = np.cov((states[1:] - states[:-1] @ A.T).T).reshape(d_state, d_state) + 1e-4 * np.eye(d_state)
        R = np.maximum((filled[1:] - states @ C.T).var(axis=0), 1e-3 * np.nanvar(x, axis=0) + 1e-9)
        P0 = np.cov(states.T).reshape(d_state, d_state) + 1e-4 * np.eye(d_state)
        phi = c = None
        if missing == "mnar":
            share = np.clip(np.isnan(x).mean(axis=0), 1e-3, 1 - 1e-3)
            phi, c = np.zeros((x.shape[1], d_state)), np.log(share / (1 - share))
        return cls(A, Q, C, d, R, np.zeros(d_state), P0, phi, c)

    def filter(self, x: Any) -> Filtered:
        """Forward pass over x (t, v), NaN where missing.

        The likelihood is that of the observed values; with "mnar" the state has also seen the mask.
        """
        x = np.asarray(x, np.float64)
        steps, n = len(x), len(self.m0)
        kept = [np.empty((steps, n)), np.empty((steps, n, n)), np.empty((steps, n)), np.empty((steps, n, n))]
        mean, cov, total = self.m0, self.P0, 0.0
        weight = _evidence(np.isnan(x))
        for t, row in enumerate(x):
            if t:
                mean, cov = self.A @ mean, _symmetric(self.A @ cov @ self.A.T + self.Q)
            kept[0][t], kept[1][t] = mean, cov
            mean, cov = self._see_mask(mean, cov, np.isnan(row), weight)
            seen = ~np.isnan(row)
            if seen.any():
                mean, cov, gain = _update(mean, cov, row[seen] - self.d[seen], self.C[seen], self.R[seen])
                total += gain
            kept[2][t], kept[3][t] = mean, cov
        return Filtered(kept[0], kept[1], kept[2], kept[3], total)

    def _see_mask(self, mean: Array, cov: Array, missing: npt.NDArray[np.bool_], weight: Array) -> tuple[Array, Array]:
        if self.phi is None or self.c is None:
            return mean, cov
        state, predicted = mean, self.phi @ mean
        spread = cov @ self.phi.T
        gain = np.linalg.solve(self.phi @ spread + np.diag(4 / weight), spread.T).T
        for _ in range(8):
            # Each step maximises a parabola below the log posterior (curvature at most 1/4), so none overshoots.
            reached = self.phi @ state
            state = mean + gain @ (reached + 4 * (missing - _sigmoid(reached + self.c)) - predicted)
        p = _sigmoid(self.phi @ state + self.c)
        curvature = np.maximum(weight * p * (1 - p), 1e-6)
        return state, _update(mean, cov, self.phi @ state, self.phi, 1 / curvature)[1]

    def smooth(self, x: Any, filtered: Filtered | None = None) -> Smoothed:
        """Backward pass (Rauch, Tung & Striebel) over x (t, v)."""
        f = self.filter(x) if filtered is None else filtered
        mean, cov, cross = f.mean.copy(), f.cov.copy(), np.zeros_like(f.cov)
        for t in range(len(mean) - 2, -1, -1):
            gain = np.linalg.solve(f.predicted_cov[t + 1], self.A @ f.cov[t]).T
            mean[t] += gain @ (mean[t + 1] - f.predicted_mean[t + 1])
            cov[t] = _symmetric(cov[t] + gain @ (cov[t + 1] - f.predicted_cov[t + 1]) @ gain.T)
            cross[t + 1] = cov[t + 1] @ gain.T
        return Smoothed(mean, cov, cross)

    def fit(self, x: Any, iterations: int = 30, tolerance: float = 1e-5) -> tuple[LinearGaussian, list[float]]:
        """Expectation maximisation.

        Args:
            x: (t, v), NaN where missing.
            iterations: At most so many.
            tolerance: Stop when the likelihood per value grows by less.

        Returns:
            The model, and the log-likelihood before each iteration. With "mar" it never falls. With "mnar" how gaps
            depend on the state is learned from states that were smoothed without the mask: too little rather than too
            much is then ascribed to it, above all where all variates of a step are always missing together.
        """
        x = np.asarray(x, np.float64)
        model, found, count = self, [], max(1, int(np.isfinite(x).sum()))
        for _ in range(iterations):
            filtered = model.filter(x)
            found.append(filtered.log_likelihood)
            if len(found) > 1 and 0 <= found[-1] - found[-2] < tolerance * count:
                break
            model = model._maximised(x, model.smooth(x, filtered))
        return model, found

    def _maximised(self, x: Array, s: Smoothed) -> LinearGaussian:
        second = s.cov + s.mean[:, :, None] * s.mean[:, None, :]  # E z z^T
        lagged = (s.cross[1:] + s.mean[1:, :, None] * s.mean[:-1, None, :]).sum(0)
        A = np.linalg.solve(second[:-1].sum(0), lagged.T).T
        Q = _symmetric((second[1:].sum(0) - A @ lagged.T) / (len(x) - 1))
        C, d, R = self.C.copy(), self.d.copy(), self.R.copy()
        for i in range(x.shape[1]):
            seen = ~np.isnan(x[:, i])
            value, mean = x[seen, i], s.mean[seen]
            # Regression on the state and a constant.
            moments = np.block([[second[seen].sum(0), mean.sum(0)[:, None]], [mean.sum(0), np.array([seen.sum()])]])
            right = np.append(value @ mean, value.sum())
            weights = np.linalg.lstsq(moments, right, rcond=None)[0]
            C[i], d[i] = weights[:-1], weights[-1]
            R[i] = max((value @ value - weights @ right) / seen.sum(), 1e-8)
        model = replace(self, A=A, Q=Q + 1e-10 * np.eye(len(Q)), C=C, d=d, R=R, m0=s.mean[0], P0=_symmetric(s.cov[0]))
        if self.phi is None or self.c is None:
            return model
        # On states that have not seen the mask: those that have would confirm any phi, which then grows without end.
        unaware = replace(self, phi=None, c=None).smooth(x).mean
        phi, c = _logistic(unaware, np.isnan(x), self.phi, self.c)
        return replace(model, phi=phi, c=c)

    def impute(self, x: Any) -> Array:
        """x (t, v) with smoothed means in its gaps."""
        x = np.asarray(x, np.float64)
        return np.where(np.isnan(x), self.smooth(x).mean @ self.C.T + self.d, x)

    def sample(self, steps: int, seed: int = 0) -> tuple[Array, Array]:
        """States (t, n) and series (t, v), NaN where "mnar" hides them."""
        rng = np.random.default_rng(seed)
        root, start = np.linalg.cholesky(self.Q), np.linalg.cholesky(self.P0)
        z = np.empty((steps, len(self.m0)))
        z[0] = self.m0 + start @ rng.standard_normal(len(self.m0))
        for t in range(1, steps):
            z[t] = self.A @ z[t - 1] + root @ rng.standard_normal(len(self.m0))
        x = z @ self.C.T + self.d + np.sqrt(self.R) * rng.standard_normal((steps, len(self.d)))
        if self.phi is not None and self.c is not None:
            x = np.where(rng.random(x.shape) < _sigmoid(z @ self.phi.T + self.c), np.nan, x)
        return z, x


def kalman_impute(ds: xr.Dataset, missing: Missing = "mar", d_state: int | None = None, iterations: int = 20) -> Array:
    """Every series of a Dataset filled by a model fitted to it alone.

    Args:
        ds: Dataset in the schema.
        missing: "mar", or "mnar" for gaps that depend on the level.
        d_state: State size; None takes twice the number of variates, at most 16.
        iterations: Of EM at most.

    Returns:
        (series, time, variate); variates are standardised for the fit. One without any value stays NaN.
    """
    values = canonical(ds)["target"].transpose("series", "time", "variate").to_numpy().astype(np.float64)
    filled = values.copy()
    for row in filled:
        known = np.isfinite(row).any(axis=0)
        if not known.any():
            continue
        mean, scale = np.nanmean(row[:, known], axis=0), np.nanstd(row[:, known], axis=0)
        scale = np.where(scale > 0, scale, 1.0)
        x = (row[:, known] - mean) / scale
        size = min(16, 2 * x.shape[1]) if d_state is None else d_state
        model, _ = LinearGaussian.create(x, size, missing).fit(x, iterations)
        row[:, known] = np.where(np.isnan(x), model.impute(x) * scale + mean, row[:, known])
    return filled


def _update(mean: Array, cov: Array, value: Array, C: Array, R: Array) -> tuple[Array, Array, float]:
    """Condition N(mean, cov) on value = C z + N(0, diag R); also the log density of the value."""
    residual = value - C @ mean
    S = _symmetric(C @ cov @ C.T + np.diag(R))
    gain = np.linalg.solve(S, C @ cov).T
    keep = np.eye(len(mean)) - gain @ C
    _sign, logdet = np.linalg.slogdet(S)
    density = -0.5 * (residual @ np.linalg.solve(S, residual) + logdet + len(value) * np.log(2 * np.pi))
    return mean + gain @ residual, _symmetric(keep @ cov @ keep.T + (gain * R) @ gain.T), float(density)


def _evidence(missing: npt.NDArray[np.bool_]) -> Array:
    """What a missing entry of each variate counts, (v,): 1 where gaps are independent, less if they come in blocks."""
    count, share = missing.sum(axis=0), missing.mean(axis=0)
    starts = missing[0] + (missing[1:] & ~missing[:-1]).sum(axis=0)
    expected = count * (1 - share)  # starts of gaps that are independent
    return np.clip(np.where(expected > 0, starts / np.maximum(expected, 1e-12), 1.0), 1e-3, 1.0)


def _logistic(z: Array, missing: npt.NDArray[np.bool_], phi: Array, c: Array, steps: int = 3) -> tuple[Array, Array]:
    """Newton steps of a logistic regression of each column of the mask on the states, shrunk to 0.

    The penalty is that of a prior under which the states together move the log odds by about 1 / sqrt(2).
    """
    features = np.column_stack([z, np.ones(len(z))])
    weights, evidence = np.column_stack([phi, c]), _evidence(missing)
    shrink = np.append(2 * z.shape[1] * z.var(axis=0) + 1e-6, 1e-3)  # states of a constant series do not vary
    for _ in range(steps):
        for i, row in enumerate(weights):
            p = _sigmoid(features @ row)
            gradient = evidence[i] * (features.T @ (missing[:, i] - p)) - shrink * row
            curvature = evidence[i] * ((features.T * (p * (1 - p))) @ features) + np.diag(shrink)
            weights[i] = row + np.linalg.solve(curvature, gradient)
    return weights[:, :-1], weights[:, -1]


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def _symmetric(matrix: Array) -> Array:
    return 0.5 * (matrix + matrix.T)


def _lines(x: Array) -> Array:
    steps = np.arange(len(x))
    return np.column_stack([np.interp(steps, steps[~np.isnan(v)], v[~np.isnan(v)]) for v in x.T])
