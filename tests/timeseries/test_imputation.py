"""Imputation: hiding, lines between neighbours, a model that beats them, saved and loaded, the verb."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import xarray as xr

from omnissm.__main__ import main
from omnissm.timeseries import create_model
from omnissm.timeseries.data import create_synthetic
from omnissm.timeseries.files import write_series
from omnissm.timeseries.fitting import MemoryData
from omnissm.timeseries.frames import from_numpy
from omnissm.timeseries.imputation import METHODS, Imputation, Imputer, compare_imputations, hide, hide_blocks
from omnissm.timeseries.models import IMPUTERS
from omnissm.timeseries.models.layers import interpolate
from omnissm.timeseries.windows import Windows


@pytest.fixture(scope="module")
def blackout():
    return create_synthetic("blackout", length=700, n_variates=3, noise=0.05)


def test_lines_are_those_of_numpy():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(5, 20)), rng.random((5, 20)) < 0.4
    mask[3] = False
    mask[4] = True
    found = interpolate(torch.tensor(x), torch.tensor(mask)).numpy()
    for row in range(5):
        steps = np.flatnonzero(mask[row])
        expected = np.interp(np.arange(20), steps, x[row, steps]) if len(steps) else np.zeros(20)
        np.testing.assert_allclose(found[row], expected, atol=1e-12)


def test_only_observed_steps_are_hidden():
    mask = torch.rand(40, 3, 48) < 0.8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.stack([hide(mask, 0.25, 12, generator) for _ in range(20)])
    assert not (hidden & ~mask).any()
    assert 0.2 < (hidden.sum() / (20 * mask.sum())) < 0.3


@pytest.mark.parametrize("name", sorted(IMPUTERS))
def test_untrained_models_draw_lines_and_train(name, blackout):
    torch.manual_seed(0)
    batch = Windows(blackout.drop_vars("truth"), 24, 1).get_batch(range(4))
    model = create_model(name, task="imputation", n_variates=3, lookback=24)
    torch.testing.assert_close(model(batch), interpolate(batch.x, batch.x_mask))
    torch.nn.init.normal_(model.head.weight, std=0.1)
    model(batch).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    nothing = batch._replace(x=torch.zeros_like(batch.x), x_mask=torch.zeros_like(batch.x_mask))
    assert torch.isfinite(model(nothing)).all()


@pytest.mark.parametrize("sizes", [{"train": 60, "val": 20, "test": 20}, {"train": 0, "val": None, "test": 50}])
def test_only_steps_of_the_part_count(sizes):
    values = np.where(np.arange(100) < (60 if sizes["train"] else 0), 1e3, 2.0)
    values[80:] = 3.0 if sizes["train"] else 2.0
    data = MemoryData(from_numpy(values, freq=1), lookback=24, horizon=1, scaler="none", **sizes)
    task = Imputation(lookback=24, n_variates=data.n_variates)
    task.net = Zeros()
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    (found,) = trainer.validate(task, data, verbose=False)
    assert found["val/rmse"] == pytest.approx(2.0)
    (found,) = trainer.test(task, data, verbose=False)
    assert found["test/rmse"] == pytest.approx(3.0 if sizes["train"] else 2.0)


class Zeros(torch.nn.Module):
    """Reconstructs nothing."""

    def forward(self, batch):
        return torch.zeros_like(batch.x)


@pytest.fixture(scope="module")
def imputer(blackout):
    model_args = {"n_layer": 1, "d_model": 32}
    gappy = hide_blocks(blackout.assign(target=blackout["truth"]), 0.15, 10)[0]
    return Imputer(window=48, longest=12, model_args=model_args).fit(gappy, max_epochs=5, stride=2, lr=1e-2)


def test_beats_last_value_and_lines_in_long_gaps(blackout, imputer):
    gappy, truth = hide_blocks(blackout.assign(target=blackout["truth"]), 0.15, 10)
    filled = {"model": imputer.impute(gappy), **{name: METHODS[name](gappy) for name in ("linear", "last_value")}}
    table = compare_imputations(truth, filled).set_index("method")
    assert table.loc["model", "rmse"] < 0.8 * table.loc["linear", "rmse"] < table.loc["last_value", "rmse"]
    assert table.loc["model", "values"] == int(truth.notnull().sum())


@pytest.mark.slow
@pytest.mark.timeout(300)  # 10 CPU seconds, of which a busy machine gives few
def test_beats_last_value_and_lines_where_high_values_go_missing():
    blackout = create_synthetic("blackout", length=1000, n_variates=3, seed=1)
    imputer = Imputer(window=48, longest=4, model_args={"n_layer": 1, "d_model": 32})  # most gaps are short
    imputer.fit(blackout, max_epochs=6, stride=4, lr=1e-2, progress=False)
    truth = blackout["truth"].where(blackout["target"].isnull())
    filled = {"model": imputer.impute(blackout)}
    filled |= {name: METHODS[name](blackout) for name in ("linear", "last_value")}
    table = compare_imputations(truth, filled).set_index("method")
    assert table.loc["model", "rmse"] < 0.95 * table.loc["linear", "rmse"]
    assert table.loc["linear", "rmse"] < table.loc["last_value", "rmse"]
    assert table.loc["model", "values"] == int(blackout["target"].isnull().sum())


def test_observed_values_stay(blackout, imputer):
    filled = imputer.impute(blackout)
    target = filled["target"].isel(series=0)
    assert np.isfinite(target).all()
    np.testing.assert_array_equal(filled["imputed"].isel(series=0), blackout["target"].isnull())
    np.testing.assert_array_equal(target.where(blackout["target"].notnull()), blackout["target"])


def test_saved_imputers_fill_the_same_and_short_series_too(blackout, imputer, tmp_path):
    imputer.save(tmp_path / "model")
    again = Imputer.load(tmp_path / "model")
    short = blackout.isel(time=slice(0, 30))
    xr.testing.assert_identical(again.impute(short), imputer.impute(short))
    with pytest.raises(ValueError, match="not trained"):
        Imputer().impute(short)


def test_hidden_blocks_are_gone_and_known():
    ds = create_synthetic("sines", length=200, n_variates=2)
    gappy, truth = hide_blocks(ds, 0.2, 10)
    hidden = truth.notnull().values[0]
    np.testing.assert_array_equal(gappy["target"].isnull().values[0], hidden)
    np.testing.assert_array_equal(truth.values[0][hidden], ds["target"].values[hidden])
    assert hidden.reshape(20, 10, 2).all(axis=1).sum() * 10 == hidden.sum()


def test_nothing_or_all_hidden_is_refused():
    ds = create_synthetic("sines", length=60, n_variates=2)
    with pytest.raises(ValueError, match="no block of 12 steps was hidden"):
        hide_blocks(ds, 1e-9, 12)
    with pytest.raises(ValueError, match="hide all values of x0"):
        hide_blocks(ds, 1 - 1e-9, 100)
    with pytest.raises(ValueError, match="no hidden value"):
        compare_imputations(ds["target"] * np.nan, {"linear": METHODS["linear"](ds)})


def test_errors_do_not_depend_on_what_else_is_compared(blackout):
    """Their unit is the deviation of the known values, not that of some method's filling."""
    gappy, truth = hide_blocks(blackout, 0.2, 10)
    filled = {name: METHODS[name](gappy) for name in ("last_value", "linear")}
    one = compare_imputations(truth, filled).set_index("method")
    other = compare_imputations(truth, dict(reversed(filled.items()))).set_index("method")
    assert one.loc["linear", "rmse"] == pytest.approx(other.loc["linear", "rmse"], rel=1e-9)
    error = (filled["linear"]["target"] - truth).to_numpy() / blackout["target"].std("time").to_numpy()
    assert one.loc["linear", "rmse"] == pytest.approx(np.sqrt(np.nanmean(error**2)), rel=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_series_without_values_stays_as_it_is(method):
    ds = create_synthetic("blackout", length=60, n_variates=2).drop_vars("truth")
    panel = xr.concat([ds, ds * np.nan], "series").assign_coords(series=["a", "b"])
    filled = METHODS[method](panel)
    assert np.isfinite(filled["target"].sel(series="a")).all()
    np.testing.assert_array_equal(filled["imputed"].sel(series="a"), ds["target"].isnull())
    assert np.isnan(filled["target"].sel(series="b")).all()
    assert not filled["imputed"].sel(series="b").any()
    with pytest.raises(ValueError, match="x1 has no observed value"):
        METHODS[method](ds.assign(target=ds["target"].where(ds["variate"] == "x0")))


def test_verb(blackout, imputer, tmp_path, capsys):
    write_series(blackout, tmp_path / "data.nc")
    imputer.save(tmp_path / "model")
    words = ["--data", tmp_path / "data.nc", "--checkpoint", tmp_path / "model", "--out", tmp_path / "out.nc"]
    assert main(["timeseries", "impute", *map(str, words), "--hide", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("rmse", "last_value", "linear"))
    assert main(["timeseries", "plot", "--data", str(tmp_path / "out.nc"), "--out", str(tmp_path / "a.png")]) == 0
    assert main(["timeseries", "impute", "--data", str(tmp_path / "data.nc"), "--method", "magic"]) == 2
    assert "unknown method 'magic'" in capsys.readouterr().err


def test_convert(blackout, tmp_path, capsys):
    write_series(blackout.drop_vars("truth"), tmp_path / "data.nc")
    for name in ("a.csv", "a.ts", "a.parquet"):
        assert main(["timeseries", "convert", "--data", str(tmp_path / "data.nc"), "--out", str(tmp_path / name)]) == 0
    assert "not in" not in capsys.readouterr().err
    write_series(blackout, tmp_path / "both.nc")
    words = ["--data", str(tmp_path / "both.nc"), "--out", str(tmp_path / "c.csv")]
    assert main(["timeseries", "convert", *words]) == 0
    assert "c.csv: truth;" in capsys.readouterr().err
    words = ["--data", str(tmp_path / "a.ts"), "--out", str(tmp_path / "b.nc")]
    assert main(["timeseries", "convert", *words]) == 0
    again = xr.open_dataset(tmp_path / "b.nc", engine="h5netcdf")["target"]
    np.testing.assert_allclose(again.values[0], blackout["target"].values, rtol=1e-6)
