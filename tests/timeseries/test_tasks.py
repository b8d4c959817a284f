"""The forecasting task: it learns, and its metrics are those of a direct computation."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import xarray as xr
from torch.utils.data import DataLoader

from omnissm.timeseries import metrics
from omnissm.timeseries.tasks import Forecasting, check_loss, point_forecast
from omnissm.timeseries.windows import Windows, as_is


@pytest.fixture
def series():
    rng = np.random.default_rng(0)
    steps = np.arange(200)
    target = np.sin(steps[:, None] / 12 * 2 * np.pi + np.array([0.0, 1.0])) + 0.1 * rng.normal(size=(200, 2))
    target[rng.random(target.shape) < 0.1] = np.nan
    coords = {"time": steps, "variate": ["a", "b"]}
    return xr.Dataset({"target": (("time", "variate"), target.astype(np.float32))}, coords, {"freq": 1})


def create_loader(windows, batch_size):
    return DataLoader(windows, batch_size=batch_size, collate_fn=as_is)


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", **quiet, **options)


@pytest.mark.parametrize("model", ["rlinear", "dlinear"])
@pytest.mark.parametrize("quantiles", [None, [0.1, 0.5, 0.9]])
def test_overfits_eight_samples(series, model, quantiles):
    windows = Windows(series, 48, 6, targets=range(48, 61))
    assert len(windows) == 8
    task = Forecasting(
        model,
        lookback=48,
        horizon=6,
        n_variates=2,
        quantiles=quantiles,
        optimizer=lambda groups: torch.optim.Adam(groups, lr=0.01),
    )
    loader = create_loader(windows, 8)
    trainer(max_epochs=300).fit(task, loader)
    batch = windows.get_batch(range(8))
    with torch.no_grad():
        y = point_forecast(task(batch), task.quantiles)
    error = metrics.mse(batch.y, y, batch.y_mask)
    assert error < 0.02 * np.nanvar(series["target"].values)


def test_metrics_are_exact_over_ragged_batches(series):
    windows = Windows(series, 24, 6)
    task = Forecasting("rlinear", lookback=24, horizon=6, n_variates=2, loss="mae")
    results = trainer().validate(task, create_loader(windows, 13), verbose=False)[0]
    batch = windows.get_batch(range(len(windows)))
    with torch.no_grad():
        y = task(batch)
    assert not batch.y_mask.all()
    assert results["val/mse"] == pytest.approx(metrics.mse(batch.y, y, batch.y_mask), rel=1e-6)
    assert results["val/mae"] == pytest.approx(metrics.mae(batch.y, y, batch.y_mask), rel=1e-6)
    assert results["val/loss"] == pytest.approx(results["val/mae"], rel=1e-6)
    again = trainer().test(task, create_loader(windows, 50), verbose=False)[0]
    assert again["test/mse"] == pytest.approx(results["val/mse"], rel=1e-9)


def test_pinball_loss_by_hand(series):
    windows = Windows(series, 24, 6)
    task = Forecasting("rlinear", lookback=24, horizon=6, n_variates=2, quantiles=[0.2, 0.7])
    assert task.loss == "pinball"
    batch = windows.get_batch(range(10))
    with torch.no_grad():
        y = task(batch)
        total, count = task.loss_sum(y, batch)
    expected = np.mean([metrics.pinball(batch.y, y[..., k], q, batch.y_mask) for k, q in enumerate((0.2, 0.7))])
    assert float(total / count) == pytest.approx(expected, rel=1e-5)


def test_unobserved_targets_carry_no_gradient(series):
    windows = Windows(series, 24, 6)
    task = Forecasting("rlinear", lookback=24, horizon=6, n_variates=2)
    batch = windows.get_batch(range(4))
    batch = batch._replace(y_mask=torch.zeros_like(batch.y_mask))
    total, count = task.loss_sum(task(batch), batch)
    (total / count.clamp(min=1)).backward()
    assert all(not p.grad.any() for p in task.parameters())


def test_model_without_parameters_is_tested_without_a_fit(series):
    windows = Windows(series, 24, 6)
    task = Forecasting("last_value", lookback=24, horizon=6, n_variates=2)
    assert np.isfinite(trainer().test(task, create_loader(windows, 64), verbose=False)[0]["test/mse"])


def test_loss_and_quantiles_must_go_together():
    assert check_loss("mse", (0.5,)) == "pinball"
    with pytest.raises(ValueError, match="quantiles with the loss 'pinball' and only there"):
        check_loss("pinball", None)
    with pytest.raises(ValueError, match="only there"):
        check_loss("mae", (0.5,))
    with pytest.raises(ValueError, match="unknown loss 'mes'"):
        check_loss("mes", None)


def test_config_rebuilds_the_network(series):
    from omnissm.timeseries import create_model

    task = Forecasting("dlinear", {"window": 7}, lookback=24, horizon=6, n_variates=2)
    config = task.model_config()
    assert config["model"] == "timeseries/dlinear"
    rebuilt = create_model("dlinear", **config["args"])
    rebuilt.load_state_dict(task.net.state_dict())
    batch = Windows(series, 24, 6).get_batch(range(3))
    torch.testing.assert_close(rebuilt(batch), task(batch))


def test_validation_sets_the_intervals_that_a_model_folder_carries(series):
    from omnissm.timeseries.conformal import conformal_radius

    windows = Windows(series, 24, 6)
    task = Forecasting("rlinear", lookback=24, horizon=6, n_variates=2, coverages=[0.8, 0.999])
    trainer().validate(task, create_loader(windows, 50), verbose=False)
    batch = windows.get_batch(range(len(windows)))
    with torch.no_grad():
        residuals = torch.where(batch.y_mask, batch.y - task(batch), torch.nan)
    assert task.intervals["coverages"] == [0.8]  # too few residuals for the other
    np.testing.assert_allclose(task.intervals["radius"][0], conformal_radius(residuals, 0.8), rtol=1e-5)


def test_residuals_beyond_the_limit_are_thinned_over_all_series(series, monkeypatch):
    """Windows come one series after the other, the second with errors ten times as large."""
    loud = series.assign(target=10 * series["target"])
    both = xr.concat([series, loud], xr.IndexVariable("series", ["quiet", "loud"]))
    windows = Windows(both, 24, 6)
    task = Forecasting("last_value", lookback=24, horizon=6, n_variates=2, coverages=[0.8])
    radii = []
    for limit in (10**9, windows.get_batch(range(len(windows))).y.numel() // 3):
        monkeypatch.setattr("omnissm.timeseries.tasks.MAX_RESIDUALS", limit)
        trainer().validate(task, create_loader(windows, 16), verbose=False)
        radii.append(np.mean(task.intervals["radius"]))
    assert radii[1] == pytest.approx(radii[0], rel=0.2)  # that of the first series is a tenth
