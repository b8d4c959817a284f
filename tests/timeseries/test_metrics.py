"""Metrics against direct computation, on masked arrays and over batches."""

import math

import numpy as np
import pytest
import torch
import xarray as xr

from omnissm.timeseries import metrics


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    target, forecast = rng.normal(size=(5, 3, 4)), rng.normal(size=(5, 3, 4))
    mask = rng.random((5, 3, 4)) < 0.7
    target[~mask] = np.nan
    return target, forecast, mask


def direct(target, forecast, mask, error):
    """Mean of error(y, f) over observed entries by a plain loop."""
    values = [error(y, f) for y, f, m in zip(target.ravel(), forecast.ravel(), mask.ravel()) if m]
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("mse", lambda y, f: (y - f) ** 2),
        ("mae", lambda y, f: abs(y - f)),
        ("mape", lambda y, f: 100 * abs(y - f) / abs(y)),
        ("smape", lambda y, f: 200 * abs(y - f) / (abs(y) + abs(f))),
    ],
)
def test_pointwise(arrays, name, error):
    function = getattr(metrics, name)
    expected = direct(*arrays, error)
    assert function(*arrays) == pytest.approx(expected, rel=1e-12)
    assert function(arrays[0], arrays[1]) == pytest.approx(expected, rel=1e-12)  # the mask is the finite target


def test_axis_keeps_variates(arrays):
    target, forecast, mask = arrays
    got = metrics.mse(target, forecast, mask, axis=(0, 2))
    expected = [direct(target[:, i], forecast[:, i], mask[:, i], lambda y, f: (y - f) ** 2) for i in range(3)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_rmse_is_the_root_of_mse(arrays):
    assert metrics.rmse(*arrays) == pytest.approx(math.sqrt(metrics.mse(*arrays)))


def test_nothing_observed_is_nan(arrays):
    target, forecast, mask = arrays
    none = np.zeros_like(mask)
    for name in ("mse", "rmse", "mae", "mape", "smape", "nd"):
        assert math.isnan(getattr(metrics, name)(target, forecast, none))
    mask = mask.copy()
    mask[:, 1] = False
    by_variate = metrics.mae(target, forecast, mask, axis=(0, 2))
    assert np.isnan(by_variate).tolist() == [False, True, False]


def test_mape_of_zero_target_warns_and_is_nan():
    with pytest.warns(UserWarning, match="undefined where the target is 0"):
        assert math.isnan(metrics.mape([0.0, 1.0], [1.0, 1.0]))


def test_smape_counts_zero_over_zero_as_zero():
    assert metrics.smape([0.0, 1.0], [0.0, 3.0]) == pytest.approx(50.0)  # (0 + 200 * 2 / 4) / 2


def test_mase_of_the_seasonal_naive_on_its_own_training_part_is_one():
    rng = np.random.default_rng(1)
    train = rng.normal(size=(60, 2))
    scale = metrics.seasonal_scale(train, 7)
    naive = train[:-7]
    np.testing.assert_allclose(metrics.mase(train[7:], naive, scale, axis=0), [1.0, 1.0])
    square = metrics.seasonal_scale(train, 7, power=2)
    np.testing.assert_allclose(metrics.rmsse(train[7:], naive, square, axis=0), [1.0, 1.0])


def test_seasonal_scale_skips_missing_pairs():
    train = np.array([1.0, 2.0, np.nan, 5.0, 9.0])
    assert metrics.seasonal_scale(train, 1) == pytest.approx((1 + 4) / 2)
    assert math.isnan(metrics.seasonal_scale(np.array([1.0, np.nan, 2.0]), 1))
    with pytest.raises(ValueError, match="at least 1 step"):
        metrics.seasonal_scale(train, 0)


def test_mase_of_constant_series_warns():
    with pytest.warns(UserWarning, match="constant"):
        assert math.isnan(metrics.mase([1.0], [2.0], 0.0))


def test_owa_of_the_naive_itself_is_one():
    assert metrics.owa(12.0, 1.5, 12.0, 1.5) == pytest.approx(1.0)
    assert metrics.owa(6.0, 1.5, 12.0, 1.5) == pytest.approx(0.75)


def test_nd_and_pinball_by_hand():
    target, forecast = np.array([2.0, -1.0, 4.0]), np.array([1.0, 1.0, 4.5])
    assert metrics.nd(target, forecast) == pytest.approx((1 + 2 + 0.5) / 7)
    # e = 1, -2, -0.5 at level 0.9: 0.9, 0.2, 0.05
    assert metrics.pinball(target, forecast, 0.9) == pytest.approx((0.9 + 0.2 + 0.05) / 3)


def test_median_pinball_is_half_the_absolute_error(arrays):
    assert metrics.pinball(arrays[0], arrays[1], 0.5, arrays[2]) == pytest.approx(metrics.mae(*arrays) / 2)


def test_quantile_scores(arrays):
    target, forecast, mask = arrays
    levels = np.array([0.1, 0.5, 0.9])
    quantiles = forecast[..., None] + np.array([-1.0, 0.0, 1.0])
    mean = np.mean([metrics.pinball(target, quantiles[..., k], q, mask) for k, q in enumerate(levels)])
    assert metrics.crps_quantiles(target, quantiles, levels, mask) == pytest.approx(2 * mean)
    size = np.abs(target[mask]).mean()
    assert metrics.wql(target, quantiles, levels, mask) == pytest.approx(2 * mean / size)
    with pytest.raises(ValueError, match="last axis of 3 levels"):
        metrics.wql(target, quantiles[..., :2], levels, mask)


def test_crps_forms_agree():
    """Quantiles and samples of a normal distribution approach its closed form."""
    target = np.array([-1.0, 0.3, 2.0])
    levels = (np.arange(999) + 1) / 1000
    normal = torch.distributions.Normal(0.5, 1.5)
    quantiles = np.broadcast_to(normal.icdf(torch.tensor(levels)).numpy(), (3, 999))
    exact = metrics.crps_normal(target, 0.5, 1.5)
    assert metrics.crps_quantiles(target, quantiles, levels) == pytest.approx(exact, rel=5e-3)
    assert metrics.crps_samples(target, quantiles) == pytest.approx(exact, rel=5e-3)


def test_crps_of_samples_by_pairs():
    rng = np.random.default_rng(2)
    target, samples = rng.normal(size=4), rng.normal(size=(4, 7))
    pairs = np.abs(samples[:, :, None] - samples[:, None]).mean(axis=(1, 2))
    expected = (np.abs(samples - target[:, None]).mean(axis=1) - 0.5 * pairs).mean()
    assert metrics.crps_samples(target, samples) == pytest.approx(expected)


def test_crps_of_a_point_mass_is_the_absolute_error():
    assert metrics.crps_samples([3.0], [[1.0, 1.0]]) == pytest.approx(2.0)


def test_intervals_by_hand():
    target, lower, upper = np.array([0.0, 2.0, 5.0, np.nan]), np.zeros(4), np.array([1.0, 1.0, 4.0, 8.0])
    mask = np.isfinite(target)
    assert metrics.coverage(target, lower, upper, mask) == pytest.approx(1 / 3)
    assert metrics.interval_width(lower, upper, mask) == pytest.approx(2.0)
    # widths 1 + 1 + 4, outside 0 + 1 + 1 at 2 / 0.2
    assert metrics.msis(target, lower, upper, 0.2, 2.0, mask) == pytest.approx((6 + 10 * 2) / 3 / 2)


def test_error_sums_do_not_depend_on_the_batching():
    generator = torch.Generator().manual_seed(0)
    target, forecast = torch.randn(10, 2, 3, generator=generator), torch.randn(10, 2, 3, generator=generator)
    mask = torch.rand(10, 2, 3, generator=generator) < 0.6
    whole, parts = metrics.ErrorSums(), metrics.ErrorSums()
    whole.update(target, forecast, mask)
    for piece in (slice(0, 1), slice(1, 8), slice(8, 10)):
        parts.update(target[piece], forecast[piece], mask[piece])
    torch.testing.assert_close(whole.values, parts.values, rtol=1e-14, atol=0)
    expected = metrics.mse(target.numpy(), forecast.numpy(), mask.numpy())
    assert whole.compute()["mse"] == pytest.approx(expected, rel=1e-6)
    mean_of_means = np.mean([metrics.mse(target[p], forecast[p], mask[p]) for p in (slice(0, 1), slice(1, 10))])
    assert abs(mean_of_means - expected) > 1e-3  # which is what the sums are for
    assert math.isnan(metrics.ErrorSums().compute()["mae"])


def test_seasonal_errors_know_what_was_observed_and_need_no_series():
    values = np.array([1.0, 2, 4, 99, 5, 7, 6])[:, None]
    seen = values != 99
    ds = xr.Dataset({"target": (("time", "variate"), values), "observed": (("time", "variate"), seen)})
    expected = {"seasonal_mae": [[1.5]], "seasonal_mse": [[2.5]]}  # steps of 1, 2, 2 and -1
    assert metrics.seasonal_errors(ds, 1) == expected
    panel = xr.concat([ds, ds.assign(target=2 * ds["target"])], "series")
    assert metrics.seasonal_errors(panel, 1) == {"seasonal_mae": [[1.5], [3.0]], "seasonal_mse": [[2.5], [10.0]]}
