"""Split conformal: ranks by hand, and coverage on exchangeable data."""

import numpy as np
import pytest

from omnissm.timeseries.conformal import conformal_radius, interval_levels


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
