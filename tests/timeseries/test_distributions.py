"""Distributions: densities, quantiles and scores against scipy's numbers, integrals and draws; units there and back."""

import numpy as np
import pytest
import torch

from omnissm.timeseries import metrics
from omnissm.timeseries.distributions import DISTRIBUTIONS, find_distribution
from omnissm.timeseries.special import betainc, student_cdf, student_quantile

NORMAL, STUDENT, COUNTS = (DISTRIBUTIONS[name] for name in ("normal", "student_t", "negative_binomial"))


# Golden numbers of scipy 1.17: special.betainc, t.ppf, nbinom.ppf; CRPS by numerical integration of its definition.
@pytest.mark.parametrize(
    ("a", "b", "x", "value"),
    [
        (2.5, 0.5, 0.3, 0.018927124071945658),
        (0.5, 0.5, 0.9, 0.7951672353008665),
        (300.0, 20.0, 0.95, 0.8211940072460824),
        (1000.0, 3.0, 0.9999, 0.9998448715466615),
        (3.0, 4000.0, 0.0005, 0.32359431641489955),
        (1.0, 1.0, 0.0, 0.0),
        (2.0, 3.0, 1.0, 1.0),
    ],
)
def test_incomplete_beta(a, b, x, value):
    assert float(betainc(a, b, x)) == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(
    ("df", "expected"),
    [
        (2.0, (-22.327124770119873, -4.302652729749464, 0.0, 1.0606601717798214)),
        (2.3, (-16.279415982702886, -3.8071632082321325, 0.0, 1.0273159317369902)),
        (7.5, (-4.6303190940341015, -2.3330396268649745, 0.0, 0.8922093469396745)),
        (10000.0, (-3.091047516030612, -1.9602012398906263, 0.0, 0.8416571791416534)),
    ],
)
def test_student_quantiles(df, expected):
    levels = (0.001, 0.025, 0.5, 0.8)
    found = student_quantile(levels, np.array([df, 3.0]))
    np.testing.assert_allclose(found[0], expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(student_cdf(found[1], 3.0), levels, rtol=1e-8)


@pytest.mark.parametrize(
    ("mean", "dispersion", "expected"),
    [
        (0.3, 0.5, (0, 0, 0, 1, 2)),
        (4.0, 0.001, (1, 2, 4, 7, 8)),
        (50.0, 2.0, (0, 1, 23, 136, 252)),
        (900.0, 0.05, (546, 651, 885, 1169, 1340)),
    ],
)
def test_negative_binomial_quantiles(mean, dispersion, expected):
    found = COUNTS.quantiles(np.array([[mean, dispersion]]), (0.025, 0.1, 0.5, 0.9, 0.975))
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize(
    ("parameters", "target", "value"),
    [
        ((0.0, 1.0, 2.5), 0.7, 0.45423719025268544),
        ((3.0, 2.0, 5.0), -1.0, 2.7940721543053324),
        ((1.0, 0.5, 30.0), 1.0, 0.11862410052764508),
        ((0.0, 1.0, 1000.0), 2.0, 1.4524872295018583),
    ],
)
def test_crps_of_student_t(parameters, target, value):
    assert float(STUDENT.crps(np.array(parameters), np.array(target))) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("parameters", "target", "value"),
    [((0.3, 0.5), 1.0, 0.5739907938562037), ((4.0, 0.001), 2.0, 1.1085191170177657), ((50.0, 2.0), 10.0, 12.8357145)],
)
def test_crps_of_counts_is_estimated_without_bias(parameters, target, value):
    many = np.broadcast_to(parameters, (2000, 2))
    found = COUNTS.crps(many, np.full(2000, target))
    error = found.std() / 2000**0.5
    assert abs(found.mean() - value) < 4 * error
    assert error < 0.01 * value


def test_crps_of_the_normal():
    assert float(NORMAL.crps(np.array([0.1, 2.0]), np.array(0.7))) == pytest.approx(0.5386658013733268, rel=1e-10)
    target = np.random.default_rng(0).normal(size=50)
    mean, scale = np.full(50, 0.3), np.full(50, 1.4)
    own = NORMAL.crps(np.stack([mean, scale], -1), target).mean()
    assert own == pytest.approx(metrics.crps_normal(target, mean, scale), rel=1e-12)


def test_log_densities():
    t = torch.tensor([0.1, 2.0, 2.5], dtype=torch.float64)
    y = torch.tensor(0.7, dtype=torch.float64)
    assert float(STUDENT.log_prob(t, y)) == pytest.approx(-1.7716792757356554, rel=1e-12)
    assert float(NORMAL.log_prob(t[:2], y)) == pytest.approx(-1.657085713764618, rel=1e-12)
    counts = torch.tensor([5.0, 0.4], dtype=torch.float64)
    assert float(COUNTS.log_prob(counts, torch.tensor(7.0))) == pytest.approx(-2.70529728916849, rel=1e-6)
    several = torch.arange(3000, dtype=torch.float64)
    assert float(COUNTS.log_prob(counts.expand(3000, 2), several).exp().sum()) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("family", DISTRIBUTIONS.values(), ids=lambda family: family.name)
def test_deviance_is_zero_at_the_likeliest_value_only(family):
    y = torch.tensor([5.0, 0.4, 3.0], dtype=torch.float64)[: len(family.parameters)]
    targets = torch.arange(0.0, 40.0, dtype=torch.float64)
    found = family.deviance(y.expand(40, -1), targets)
    likeliest = targets[family.log_prob(y.expand(40, -1), targets).argmax()]
    assert float(found.min()) == pytest.approx(0.0, abs=1e-9)
    assert targets[found.argmin()] == likeliest
    assert (found >= 0).all()
    z = torch.tensor(3.0, dtype=torch.float64)
    assert float(NORMAL.deviance(torch.tensor([1.0, 0.5]), z)) == pytest.approx(16.0)


@pytest.mark.parametrize("family", DISTRIBUTIONS.values(), ids=lambda family: family.name)
def test_draws_follow_the_quantiles(family):
    y = np.array([5.0, 0.4, 3.0])[: len(family.parameters)]
    drawn = family.sample(y, 40_000, np.random.default_rng(0))
    assert drawn.shape == (40_000,)
    for level, value in zip((0.1, 0.5, 0.9), family.quantiles(y, (0.1, 0.5, 0.9))):
        slack = 4 * (level * (1 - level) / 40_000) ** 0.5
        assert (drawn <= value).mean() >= level - slack
        assert (drawn < value).mean() <= level + slack  # strict, since counts repeat
    again = family.sample(y, 40_000, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, again)


@pytest.mark.parametrize("name", ["normal", "student_t"])
def test_units_are_those_of_the_moved_variable(name):
    """Densities, quantiles and scores of a + b X are those of X, moved."""
    family = find_distribution(name)
    y = np.array([[0.3, 0.7, 4.0], [-1.0, 2.0, 2.2]])[:, : len(family.parameters)]
    moved = family.in_units(y, np.array([10.0, -3.0]), np.array([5.0, 0.1]))
    center, scale = np.array([10.0, -3.0]), np.array([5.0, 0.1])
    target = np.array([0.9, 0.2])
    levels = (0.05, 0.5, 0.8)
    np.testing.assert_allclose(
        family.quantiles(moved, levels), family.quantiles(y, levels) * scale[:, None] + center[:, None]
    )
    np.testing.assert_allclose(family.crps(moved, target * scale + center), family.crps(y, target) * scale, rtol=1e-9)
    before = family.log_prob(torch.from_numpy(y), torch.from_numpy(target))
    after = family.log_prob(torch.from_numpy(moved), torch.from_numpy(target * scale + center))
    torch.testing.assert_close(after, before - torch.from_numpy(np.log(scale)))
    window = family.denormalized(
        torch.from_numpy(y)[:, None, None],
        torch.from_numpy(center)[:, None, None],
        torch.from_numpy(scale)[:, None, None],
    )
    np.testing.assert_allclose(window[:, 0, 0].numpy(), moved)


@pytest.mark.parametrize("family", DISTRIBUTIONS.values(), ids=lambda family: family.name)
@pytest.mark.parametrize("size", [-60.0, 0.0, 60.0])
def test_any_free_numbers_are_legal_parameters(family, size):
    raw = torch.full((3, len(family.parameters)), size, requires_grad=True)
    y = family.shaped(raw)
    assert (y[:, 1:] > 0).all()
    log_prob = family.log_prob(y, torch.tensor([0.0, 1.0, 3.0]))
    assert torch.isfinite(log_prob).all()
    log_prob.sum().backward()
    assert torch.isfinite(raw.grad).all()


def test_counts_have_no_other_units():
    with pytest.raises(ValueError, match="scaler: none"):
        COUNTS.in_units(np.ones((2, 2)), np.array(0.0), np.array(2.0))


def test_close_names():
    with pytest.raises(ValueError, match="unknown distribution 'student'; did you mean student_t"):
        find_distribution("student")
    assert find_distribution(None) is None
