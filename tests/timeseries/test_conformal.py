"""Split conformal: ranks by hand, coverage on exchangeable data. Tracked: updates by hand, coverage on any data."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from omnissm.timeseries.conformal import conformal_radius, interval_levels, track_intervals, tracked_radius


def test_rank_by_hand():
    residuals = np.array([3.0, -1.0, 2.0, -5.0, 4.0, 0.5, -0.1, 7.0, 6.0]).reshape(9, 1, 1)
    # n = 9, coverage 0.8: the ceil(10 * 0.8) = 8th smallest of .1 .5 1 2 3 4 5 6 7
    assert conformal_radius(residuals, 0.8).item() == 6.0
    assert conformal_radius(residuals, 0.5).item() == 3.0


def test_missing_residuals_are_not_counted():
    residuals = np.arange(1.0, 21.0).reshape(20, 1, 1).repeat(2, axis=1)
    residuals[10:, 1] = np.nan
    radius = conformal_radius(residuals, 0.8)
    assert radius[:, 0].tolist() == [17.0, 9.0]  # ceil(21 * 0.8) and ceil(11 * 0.8)


def test_covers_new_exchangeable_data():
    rng = np.random.default_rng(0)
    old, new = rng.standard_t(3, size=(2, 4000, 2, 3))
    for coverage in (0.5, 0.9):
        inside = np.abs(new) <= conformal_radius(old, coverage)
        assert inside.mean() == pytest.approx(coverage, abs=0.02)


def test_average_coverage_is_at_least_nominal_for_few_residuals():
    rng = np.random.default_rng(1)
    hits = [abs(rng.normal()) <= conformal_radius(rng.normal(size=(10, 1, 1)), 0.8).item() for _ in range(2000)]
    assert np.mean(hits) >= 0.8 - 0.02


def test_too_few_residuals_are_refused():
    residuals = np.ones((19, 2, 3))
    with pytest.raises(ValueError, match=r"coverage 0\.95 needs at least 20 validation residuals, variate temp has 19"):
        conformal_radius(residuals, 0.95, ["temp", "wind"])
    assert conformal_radius(np.ones((20, 2, 3)), 0.95).shape == (2, 3)
    with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
        conformal_radius(residuals, 95)


def test_levels_surround_the_median():
    assert interval_levels((0.8, 0.95)) == (0.025, 0.1, 0.5, 0.9, 0.975)


def test_updates_by_hand():
    residuals = np.array([2.0, 0.5, np.nan, 9.0, 0.0])
    radius = tracked_radius(residuals, [1, 2, 3, 4, 5], 1.0, 0.8, rate=0.5)
    # a miss adds 0.5 * 0.8 to the logarithm, a hit takes 0.5 * 0.2, a missing target changes nothing
    np.testing.assert_allclose(np.log(radius), [0.0, 0.4, 0.3, 0.3, 0.7], atol=1e-12)
    late = tracked_radius(residuals, [2, 3, 4, 5, 5], 1.0, 0.8, rate=0.5)
    np.testing.assert_allclose(np.log(late), [0.0, 0.0, 0.4, 0.3, 0.3], atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=300),
    st.integers(1, 20),
    st.floats(0.05, 0.95),
    st.floats(0.01, 2.0),
    st.floats(0.01, 10),
)
def test_misses_are_bounded_for_any_data(residuals, delay, coverage, rate, start):
    """The two bounds in the docstring of the module, for residuals from 0.01 to 10."""
    residuals = np.array(residuals)
    radius = tracked_radius(residuals, np.arange(len(residuals)) + delay, start, coverage, rate)
    used = max(0, len(residuals) - delay)  # forecasts whose target became known before the last one was made
    if used:
        misses = (residuals[:used] > radius[:used]).mean() - (1 - coverage)
        assert misses <= (np.log(10 / start) + (delay + 1) * rate) / (rate * used) + 1e-9
        assert misses >= -(np.log(start / 0.01) + (delay + 1) * rate) / (rate * used) - 1e-9


def create_backtest(drift, cutoffs=1500, horizon=3):
    """Forecasts of zero whose errors grow along the way, with intervals that fit the beginning."""
    rng = np.random.default_rng(0)
    scale = np.linspace(1, drift, cutoffs)[None, :, None, None]
    target = rng.standard_normal((2, cutoffs, horizon, 2)) * scale
    target[rng.random(target.shape) < 0.05] = np.nan
    dims, levels = ("series", "cutoff", "horizon", "variate"), [0.05, 0.25, 0.5, 0.75, 0.95]
    spread = np.array([-1.645, -0.674, 0.0, 0.674, 1.645])
    valid = np.arange(cutoffs)[:, None] + np.arange(1, horizon + 1)
    return xr.Dataset(
        {
            "mean": (dims, np.zeros_like(target)),
            "target": (dims, target),
            "quantiles": ((*dims, "quantile"), np.broadcast_to(spread, (*target.shape, 5))),
        },
        {"cutoff": np.arange(cutoffs), "quantile": levels, "valid_time": (("cutoff", "horizon"), valid)},
    )


def covered(ds, low, high):
    inside = (ds["target"] >= ds["quantiles"].sel(quantile=low)) & (ds["target"] <= ds["quantiles"].sel(quantile=high))
    return inside.where(ds["target"].notnull()).mean(("series", "cutoff"))


def test_follows_errors_that_grow():
    backtest = create_backtest(drift=4)
    assert (covered(backtest, 0.05, 0.95) < 0.7).all()
    tracked = track_intervals(backtest)
    for low, high in ((0.05, 0.95), (0.25, 0.75)):
        np.testing.assert_allclose(covered(tracked, low, high), high - low, atol=0.03)
    assert (tracked["quantiles"].diff("quantile") >= 0).all()
    assert tracked["quantiles"].dims == backtest["quantiles"].dims
    xr.testing.assert_identical(tracked.drop_vars("quantiles").drop_attrs(), backtest.drop_vars("quantiles"))


def test_looks_at_nothing_that_is_not_known_yet():
    backtest = create_backtest(drift=2, cutoffs=60)
    changed = backtest.copy(deep=True)
    late = changed["valid_time"] > 30
    changed["target"] = xr.where(late, 100.0, changed["target"]).transpose(*backtest["target"].dims)
    before, after = (track_intervals(ds)["quantiles"] for ds in (backtest, changed))
    xr.testing.assert_equal(after.sel(cutoff=slice(None, 30)), before.sel(cutoff=slice(None, 30)))
    assert not after.sel(cutoff=slice(31, None)).equals(before.sel(cutoff=slice(31, None)))


def test_tracking_says_what_it_needs():
    backtest = create_backtest(drift=1, cutoffs=5)
    with pytest.raises(ValueError, match="which has targets"):
        track_intervals(backtest.drop_vars("target"))
    with pytest.raises(ValueError, match="central intervals"):
        track_intervals(backtest.isel(quantile=[0, 2]))
    with pytest.raises(ValueError, match="cutoffs that ascend"):
        track_intervals(backtest.isel(cutoff=[1, 0]))
    with pytest.raises(ValueError, match="positive rate"):
        track_intervals(backtest, rate=0)
    with pytest.raises(ValueError, match="behind each forecast's own place"):
        tracked_radius(np.ones(2), [0, 1], 1.0, 0.9)
