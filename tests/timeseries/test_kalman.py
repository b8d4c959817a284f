"""The linear-Gaussian model against dense normal distributions, and what modelling the mask is good for."""

from dataclasses import replace

import numpy as np
import pytest

from omnissm.timeseries.data import create_synthetic
from omnissm.timeseries.data.nyc_weather import read_nyc_weather
from omnissm.timeseries.imputation import METHODS, compare_imputations, hide_blocks
from omnissm.timeseries.kalman import LinearGaussian, _evidence, kalman_impute


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    angle = 2 * np.pi / 12
    A = 0.97 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return LinearGaussian(
        A, 0.1 * np.eye(2), rng.normal(size=(3, 2)), np.array([1.0, -1, 0]), np.full(3, 0.05), np.ones(2), np.eye(2)
    )


@pytest.fixture
def gappy(model):
    x = model.sample(7, seed=1)[1]
    x[2], x[4, 1], x[6, 0] = np.nan, np.nan, np.nan
    return x


def dense(model, steps):
    """Mean and covariance of all states, and of all values, at once."""
    n = len(model.m0)
    mean = [model.m0]
    cov = np.zeros((steps * n, steps * n))
    block = model.P0
    for t in range(steps):
        if t:
            mean.append(model.A @ mean[-1])
            block = model.A @ block @ model.A.T + model.Q
        power = block
        for s in range(t, steps):
            cov[s * n : s * n + n, t * n : t * n + n] = power
            cov[t * n : t * n + n, s * n : s * n + n] = power.T
            power = model.A @ power
    read = np.kron(np.eye(steps), model.C)
    values = read @ cov @ read.T + np.kron(np.eye(steps), np.diag(model.R))
    return np.concatenate(mean), cov, read, np.tile(model.d, steps), values


def test_likelihood_and_smoothed_states_are_those_of_the_dense_normal(model, gappy):
    mean, cov, read, offset, values = dense(model, len(gappy))
    seen = np.isfinite(gappy).ravel()
    residual = (gappy.ravel() - read @ mean - offset)[seen]
    S = values[np.ix_(seen, seen)]
    expected = -0.5 * (
        residual @ np.linalg.solve(S, residual) + np.linalg.slogdet(S)[1] + seen.sum() * np.log(2 * np.pi)
    )
    assert model.filter(gappy).log_likelihood == pytest.approx(expected, abs=1e-8)
    gain = np.linalg.solve(S, (read @ cov)[seen]).T
    smoothed = model.smooth(gappy)
    np.testing.assert_allclose(smoothed.mean.ravel(), mean + gain @ residual, atol=1e-8)
    posterior = cov - gain @ (read @ cov)[seen]
    for t in range(len(gappy)):
        np.testing.assert_allclose(smoothed.cov[t], posterior[2 * t : 2 * t + 2, 2 * t : 2 * t + 2], atol=1e-8)
        if t:
            cross = posterior[2 * t : 2 * t + 2, 2 * t - 2 : 2 * t]
            np.testing.assert_allclose(smoothed.cross[t], cross, atol=1e-8)


def test_a_row_without_values_changes_nothing_but_the_covariance(model, gappy):
    f = model.filter(gappy)
    np.testing.assert_array_equal(f.mean[2], f.predicted_mean[2])
    np.testing.assert_array_equal(f.cov[2], f.predicted_cov[2])
    assert np.trace(f.cov[2]) > np.trace(f.cov[1])


def test_likelihood_never_falls(model):
    x = model.sample(300, seed=2)[1]
    x[np.random.default_rng(0).random(x.shape) < 0.3] = np.nan
    fitted, found = LinearGaussian.create(x, 2).fit(x, 25, tolerance=0)
    assert (np.diff(found) > -1e-6).all()
    assert found[-1] > found[0]
    wanted = np.abs(np.linalg.eigvals(model.A))
    np.testing.assert_allclose(np.sort(np.abs(np.linalg.eigvals(fitted.A))), np.sort(wanted), atol=0.05)
    assert fitted.filter(x).log_likelihood > model.filter(x).log_likelihood - 20


def test_knowing_why_values_are_missing_helps(model):
    C = np.array([[1.0, 0.0], [0.9, 0.2], [1.1, -0.1]])
    noisy = replace(model, C=C, Q=0.5 * np.eye(2))
    hiding = replace(noisy, phi=3 * C, c=np.full(3, -1.0))  # all three go when the first state is high
    z, x = hiding.sample(500, seed=3)
    gaps, truth = np.isnan(x), z @ C.T + model.d
    assert 0.2 < gaps.mean() < 0.6

    def error(one):
        return np.sqrt(np.mean((one.impute(x) - truth)[gaps] ** 2))

    assert error(hiding) < 0.97 * error(noisy)


def test_beats_lines_on_blackouts():
    ds = create_synthetic("blackout", length=500, n_variates=3)
    truth = ds["truth"].where(ds["target"].isnull())
    table = compare_imputations(truth, {name: fill(ds) for name, fill in METHODS.items()}).set_index("method")["rmse"]
    assert table["kalman_mnar"] < table["linear"] < table["last_value"]
    assert table["kalman"] < table["linear"]


@pytest.mark.slow
def test_beats_lines_on_hidden_weather():
    """Blocks hidden at random: the mask tells nothing, and must not be believed to."""
    try:
        weather = read_nyc_weather(stations=["JFK"]).isel(time=slice(1000, 1600))
    except ImportError as error:
        pytest.skip(str(error))
    gappy, truth = hide_blocks(weather, 0.15, 8)
    filled = {name: METHODS[name](gappy) for name in ("last_value", "linear")}
    for missing in ("mar", "mnar"):
        values = kalman_impute(gappy, missing, iterations=5)
        filled[missing] = filled["linear"].assign(target=(filled["linear"]["target"].dims, values))
    rmse = compare_imputations(truth, filled).set_index("method")["rmse"]
    assert rmse["linear"] < rmse["last_value"]
    assert rmse["mar"] < 0.85 * rmse["linear"]
    assert rmse["mnar"] < 0.85 * rmse["linear"]


def test_blocks_count_less_than_scattered_gaps():
    rng = np.random.default_rng(0)
    scattered = rng.random((4000, 1)) < 0.2
    blocks = np.repeat(rng.random((400, 1)) < 0.2, 10, axis=0)
    found = _evidence(np.hstack([scattered, blocks, np.zeros((4000, 1), bool)]))
    assert found == pytest.approx([1.0, 0.1, 1.0], abs=0.06)


@pytest.mark.parametrize("missing", ["mar", "mnar"])
def test_constant_series_are_filled_with_their_value(missing):
    ds = create_synthetic("blackout", length=80, n_variates=2)
    constant = ds.assign(target=ds["target"] * 0 + 3.0)
    np.testing.assert_allclose(kalman_impute(constant, missing), 3.0, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="d_state=0"):
        kalman_impute(create_synthetic("sines", length=20), d_state=0)
    with pytest.raises(ValueError, match="at least 3 steps"):
        LinearGaussian.create(np.zeros((2, 1)), 1)
    with pytest.raises(ValueError, match="state of at least 1"):
        LinearGaussian.create(np.zeros((5, 1)), 0)
    with pytest.raises(ValueError, match="'mar' or 'mnar'"):
        LinearGaussian.create(np.zeros((5, 1)), 1, "maybe")
    with pytest.raises(ValueError, match="variate 1 has no observed value"):
        LinearGaussian.create(np.array([[0, np.nan]] * 5), 1)
