"""The Chimera forecaster: shapes, equivariances, missing values, covariates, and that it learns."""

from __future__ import annotations

import pytest
import torch

from omnissm.timeseries import create_model
from omnissm.timeseries.windows import WindowBatch

LOOKBACK, HORIZON, VARIATES = 48, 12, 3


def batch(size: int = 4, seed: int = 0, **parts) -> WindowBatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, VARIATES, LOOKBACK, generator=generator).cumsum(-1) * 0.2
    y = torch.randn(size, VARIATES, HORIZON, generator=generator)
    index = torch.arange(size)
    full = {
        "x": x,
        "x_mask": torch.ones_like(x, dtype=torch.bool),
        "y": y,
        "y_mask": torch.ones_like(y, dtype=torch.bool),
        "past": None,
        "future": None,
        "static": None,
        "time_gap": None,
        "series": index * 0,
        "origin": index,
    }
    return WindowBatch(**(full | parts))


def model(**options):
    torch.manual_seed(0)
    return create_model("chimera_tiny", lookback=LOOKBACK, horizon=HORIZON, n_variates=VARIATES, **options).eval()


@pytest.mark.parametrize(
    ("name", "count"), [("chimera_tiny", 48_032), ("chimera_small", 152_608), ("chimera_base", 602_720)]
)
def test_parameter_counts(name, count):
    net = create_model(name, lookback=96, horizon=96, n_variates=7)
    assert sum(p.numel() for p in net.parameters()) == count


def test_shapes_and_finite_gradients():
    net = model(mask_input=True, linear_skip=8).train()
    y = net(batch())
    assert y.shape == (4, VARIATES, HORIZON)
    y.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_quantiles_ascend():
    y = model(quantiles=(0.1, 0.5, 0.9))(batch())
    assert y.shape == (4, VARIATES, HORIZON, 3)
    assert (y.diff(dim=-1) > 0).all()


def test_targets_change_no_forecast():
    net, one = model(), batch()
    torch.testing.assert_close(net(one), net(one._replace(y=one.y + 1e3, y_mask=~one.y_mask)), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"linear_skip": 8}, {"quantiles": (0.2, 0.8)}])
def test_shift_and_scale_pass_through_instance_normalisation(options):
    net, one = model(**options), batch()
    scaled = net(one._replace(x=3.0 * one.x + 7.0))
    torch.testing.assert_close(scaled, 3.0 * net(one) + 7.0, rtol=1e-3, atol=1e-3)


def test_one_window_is_forecast_as_in_a_batch():
    net, many = model(), batch(5)
    alone = torch.cat([net(WindowBatch._make(None if p is None else p[k : k + 1] for p in many)) for k in range(5)])
    torch.testing.assert_close(alone, net(many), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("instance_norm", [True, False])
def test_missing_values_are_finite_and_unseen(instance_norm):
    net, one = model(instance_norm=instance_norm, mask_input=True), batch()
    mask = torch.rand(one.x.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:, 1] = False  # a whole variate is missing
    hidden = one._replace(x=torch.where(mask, one.x, 0.0), x_mask=mask)
    y = net(hidden)
    assert torch.isfinite(y).all()
    if instance_norm:  # then what stands at a missing entry is replaced before it is read
        torch.testing.assert_close(net(hidden._replace(x=torch.where(mask, one.x, 5.0))), y, rtol=0, atol=0)


def test_variates_do_not_mix_without_the_second_state():
    net, one = model(mixer={"mix_variates": False}), batch()
    other = one.x.clone()
    other[:, 0] += torch.randn(LOOKBACK)
    changed = (net(one) - net(one._replace(x=other))).abs().amax(dim=(0, 2))
    assert changed[0] > 1e-4
    torch.testing.assert_close(changed[1:], torch.zeros(VARIATES - 1), rtol=0, atol=1e-6)


def test_variates_mix():
    net, one = model(), batch()
    other = one.x.clone()
    other[:, 1] += torch.randn(LOOKBACK)
    changed = (net(one) - net(one._replace(x=other))).abs().amax(dim=(0, 2))
    assert (changed > 1e-5).all()


def test_token_gap_is_one_on_regular_times_and_counts_strides():
    net = model(patch_len=16, stride=8)
    gap = torch.ones(2, LOOKBACK)
    torch.testing.assert_close(net._token_gap(gap), torch.ones(2, net.n_tokens))
    gap[0, 20] = 9.0  # eight steps late, inside (15, 23]: one stride more
    expected = torch.ones(2, net.n_tokens)
    expected[0, 1] = 2.0
    torch.testing.assert_close(net._token_gap(gap), expected)
    one = batch(2)
    assert (net(one._replace(time_gap=gap)) - net(one)).abs().max() > 1e-5
    torch.testing.assert_close(net(one._replace(time_gap=torch.ones(2, LOOKBACK))), net(one))


def test_covariates_enter_the_forecast():
    net, one = model(n_past=2, n_future=3, n_static=2), batch()
    generator = torch.Generator().manual_seed(3)
    parts = {
        "past": torch.randn(4, 2, LOOKBACK, generator=generator),
        "future": torch.randn(4, 3, LOOKBACK + HORIZON, generator=generator),
        "static": torch.randn(4, VARIATES, 2, generator=generator),
    }
    with torch.no_grad():
        net.known_future.weight.normal_()
    full = one._replace(**parts)
    y = net(full)
    assert y.shape == (4, VARIATES, HORIZON)
    for name in parts:
        changed = net(full._replace(**{name: parts[name] + torch.randn(parts[name].shape)}))
        assert (changed - y).abs().max() > 1e-4, name
    with pytest.raises(ValueError, match="built for 3 future covariates, the data has none"):
        net(full._replace(future=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_len": 64}, "longer than the lookback of 48; lower patch_len"),
        ({"linear_skip": 49}, "linear_skip from 0 to 48"),
        ({"stride": 0}, "stride of at least 1"),
        ({"quantiles": (0.9, 0.1)}, "ascending"),
        ({"mixer": {"coupling": "sideways"}}, "coupling"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_learned_steps_are_reported_per_head():
    ranges = model().dt_ranges()
    assert set(ranges) == {"trend", "seasonal"}
    assert 1e-3 <= ranges["trend"].min() <= ranges["trend"].max() <= 0.1 + 1e-6
    assert 0.1 - 1e-6 <= ranges["seasonal"].min() <= ranges["seasonal"].max() <= 1 + 1e-6


def test_overfits_eight_windows():
    time = torch.arange(LOOKBACK + HORIZON) / 12.0
    phase = torch.rand(8, VARIATES, 1, generator=torch.Generator().manual_seed(0)) * 6.3
    series = torch.sin(2 * torch.pi * time + phase) + 0.3 * torch.sin(5 * time + 2 * phase)
    one = batch(8, x=series[..., :LOOKBACK], y=series[..., LOOKBACK:])
    net = model(dropout=0.0, head_dropout=0.0).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(150):
        loss = (net(one) - one.y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01 * one.y.var()


def test_pooled_forecasts_follow_the_variates():
    net = model(mixer={"coupling": "pooled"})
    assert net.variate is None
    one, order = batch(), torch.tensor([2, 0, 1])
    permuted = one._replace(x=one.x[:, order])
    torch.testing.assert_close(net(permuted), net(one)[:, order], rtol=1e-5, atol=1e-5)
