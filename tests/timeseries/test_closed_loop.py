"""Closed loops: the same as feeding predictions back by hand, blind to the future, and good for any horizon."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import xarray as xr

from omnissm.kernels import selective_scan2d
from omnissm.timeseries import Forecaster, create_model
from omnissm.timeseries.models.closed_loop import ClosedLoopGrid
from omnissm.timeseries.windows import WindowBatch


def make_loop(**options):
    torch.manual_seed(0)
    loop = ClosedLoopGrid(4, 3, **options)
    with torch.no_grad():
        loop.K.normal_(0, 0.3)
    return loop.eval()


def batch(size=3, variates=2, lookback=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, variates, lookback, generator=generator).cumsum(-1) * 0.3
    seen, number = torch.ones_like(x, dtype=torch.bool), torch.zeros(size, dtype=torch.long)
    return WindowBatch(x, seen, x[..., :12], seen[..., :12], None, None, None, None, number, number)


def model(**options):
    torch.manual_seed(0)
    options = {"head": "closed_loop", "patch_len": 12, "stride": 6, **options}
    return create_model("chimera_tiny", lookback=48, horizon=12, n_variates=2, **options).eval()


@pytest.mark.parametrize("options", [{}, {"bidirectional": False}, {"mix_variates": False}], ids=str)
def test_a_rollout_is_explicit_feedback(options):
    loop, u = make_loop(**options), torch.randn(2, 5, 6, 4)
    outputs, ahead = loop(u, 4)
    assert outputs.shape == (2, 5, 10, 4)
    fed = u
    for _ in range(4):
        fed = torch.cat([fed, loop(fed, 0)[1][:, :, -1:]], dim=2)
    torch.testing.assert_close(loop(fed, 0)[0], outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fed[:, :, 6:], ahead[:, :, 5:9], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [None, 1.7])
def test_inside_the_lookback_it_is_the_scan_of_chimera(gap):
    loop, u = make_loop(bidirectional=False), torch.randn(2, 5, 6, 4)
    projected = u @ loop.x_proj[0]
    low1, B1, C1, low2, B2, C2 = projected.split(2 * [loop.dt_rank, 3, 3], dim=-1)
    dt = [F.softplus(low @ loop.dt_proj[k, 0] + loop.dt_bias[k, 0]) for k, low in enumerate((low1, low2))]
    gaps = None if gap is None else torch.full((2, 6), gap)
    expected = selective_scan2d(u, *dt, *loop.A_log, *loop.theta, B1, B2, C1, C2, loop.D, time_gap=gaps)
    torch.testing.assert_close(loop(u, 0, time_gap=gaps)[0], expected, rtol=1e-4, atol=1e-5)


def test_masked_tokens_enter_no_state():
    loop, u = make_loop(), torch.randn(2, 5, 6, 4)
    mask = torch.rand(2, 5, 6) < 0.6
    other = torch.where(mask[..., None], u, torch.randn_like(u))
    for one, two in zip(loop(u, 3, mask=mask), loop(other, 3, mask=mask)):
        torch.testing.assert_close(one, two)


def test_one_step_predictions_are_blind_to_what_they_predict():
    loop, u = make_loop(), torch.randn(2, 5, 6, 4)
    changed = u.clone()
    changed[:, :, 4:] += 1.0
    for one, two in zip(loop(u, 2), loop(changed, 2)):
        torch.testing.assert_close(one[:, :, :4], two[:, :, :4])
        assert (one[:, :, 4:] - two[:, :, 4:]).abs().max() > 1e-3


def test_no_rollout_runs_away():
    loop, u = make_loop(), torch.randn(1, 2, 3, 4)
    calm = loop(u, 40)[0].abs().max()
    with torch.no_grad():
        loop.K.mul_(1e5)
    outputs, ahead = loop(u, 40)
    longest = u.square().mean(-1).max().sqrt()
    assert ahead[:, :, 2:].square().mean(-1).sqrt().max() <= 1.001 * longest
    assert outputs.abs().max() < 10 * calm


@pytest.mark.parametrize("options", [{}, {"quantiles": (0.1, 0.5, 0.9)}, {"distribution": "student_t"}], ids=str)
def test_any_horizon_goes_on_from_the_trained_one(options):
    net, one = model(**options), batch()
    short, long = net(one), net.forward_ahead(one, 31)
    assert long.shape[:3] == (3, 2, 31)
    torch.testing.assert_close(long[:, :, :12], short, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.forward_ahead(one, 5), short[:, :, :5], rtol=1e-4, atol=1e-5)


def test_losses_inside_the_lookback_reach_the_loop():
    net, one = model().train(), batch()
    y, extra = net.forward_train(one)
    assert y.shape == (3, 2, 12)
    (y.square().mean() + extra).backward()
    bad = [name for name, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert bad == []
    assert float(extra.detach()) > 0
    hidden = one._replace(x_mask=torch.zeros_like(one.x_mask), x=torch.zeros_like(one.x))
    assert torch.isfinite(net(hidden)).all()


def test_shift_and_scale_pass_through():
    net, one = model(), batch()
    torch.testing.assert_close(net(one._replace(x=3 * one.x + 7)), 3 * net(one) + 7, rtol=1e-3, atol=1e-3)


def test_covariates_in_a_closed_loop():
    net = model(n_past=1, n_future=2)
    one = batch()._replace(past=torch.randn(3, 1, 48), future=torch.randn(3, 2, 80))
    assert net(one).shape == (3, 2, 12)
    assert net.forward_ahead(one, 30).shape == (3, 2, 30)
    with torch.no_grad():
        net.known_future.weight.fill_(1.0)
    moved = one._replace(future=torch.cat([one.future[..., :48], one.future[..., 48:] + 1.0], dim=-1))
    scale = one.x.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(net(moved), net(one) + 2 * scale, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "horizon"), [("chimera_tiny", 36), ("spacetime", 24)])
def test_learns_a_season_and_rolls_on(name, horizon):
    steps = np.arange(500)
    values = np.stack([np.sin(2 * np.pi * steps / 24), 3 + np.cos(2 * np.pi * steps / 24)], 1)
    times = pd.date_range("2024-01-01", periods=500, freq="h")
    data = xr.DataArray(values, coords={"time": times, "variate": ["a", "b"]}, dims=("time", "variate"))
    options = {"head": "closed_loop", "patch_len": 12, "stride": 6, "dropout": 0.0, "head_dropout": 0.0}
    forecaster = Forecaster(name, 48, 12, model_args=options if name == "chimera_tiny" else {"dropout": 0.0})
    forecaster.fit(data[:400], val=0.1, max_epochs=12, lr=1e-2, progress=False)
    forecast = forecaster.predict(data[:400], horizon=horizon)
    assert forecast.attrs["rollout"] == "closed loop"
    error = forecast["mean"].values[0, 0] - values[400 : 400 + horizon]
    assert np.sqrt(np.mean(error**2)) < 0.3  # the mean has 0.7, the last value 1
    assert forecaster.predict(data[:400]).attrs["rollout"] == "direct"


def test_a_forecast_says_how_it_went_on():
    values = np.random.default_rng(0).normal(size=(120, 1))
    times = pd.date_range("2024-01-01", periods=120, freq="h")
    data = xr.DataArray(values, coords={"time": times, "variate": ["a"]}, dims=("time", "variate"))
    forecaster = Forecaster("spacetime", 24, 6, model_args={"d_model": 4, "d_state": 4})
    forecaster.fit(data, max_epochs=1, progress=False, coverages=None)
    assert forecaster.predict(horizon=20).attrs["rollout"] == "closed loop"
    assert forecaster.predict(horizon=6).attrs["rollout"] == "direct"
    np.testing.assert_allclose(
        forecaster.predict(horizon=20)["mean"][..., :6, :], forecaster.predict()["mean"], rtol=1e-4
    )


def test_variates_are_shuffled_in_training_only():
    net, one = model(head="direct", shuffle_variates=True, dropout=0.0, head_dropout=0.0), batch(variates=2)
    torch.testing.assert_close(net(one), net(one))
    net.train()
    found = torch.stack([net(one) for _ in range(12)])
    assert (found - found[:1]).abs().amax() > 1e-5  # both orders occur
    pooled = model(
        head="direct", shuffle_variates=True, dropout=0.0, head_dropout=0.0, mixer={"coupling": "pooled"}
    ).train()
    torch.testing.assert_close(pooled(one), pooled.eval()(one), rtol=1e-4, atol=1e-5)


def test_seasons_turn_the_states():
    net = model(head="direct", seasons=(24, 12))
    mixer = next(part for part in net.modules() if hasattr(part, "speed"))
    assert mixer.rotation == (4.0, 2.0)
    assert net(batch()).shape == (3, 2, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_len": 10}, "no multiple of the stride 6"),
        ({"linear_skip": 4}, "no linear_skip"),
        ({"head": "closed"}, 'expected head "direct" or "closed_loop"'),
        ({"seasons": (8,)}, "shorter than two tokens of stride 6"),
        ({"distribution": "negative_binomial"}, "which are no counts"),
    ],
    ids=str,
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)
