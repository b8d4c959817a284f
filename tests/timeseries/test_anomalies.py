"""Anomaly scores: measures against definitions, thresholds without leakage, spikes found, NAB read."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from omnissm.__main__ import main
from omnissm.timeseries import Forecaster
from omnissm.timeseries import anomalies as a
from omnissm.timeseries import metrics_anomaly as m
from omnissm.timeseries.data import create_synthetic, read_nab
from omnissm.timeseries.files import write_series
from omnissm.timeseries.imputation import Imputer


def test_measures_by_hand():
    truth = np.array([0, 1, 1, 0, 0, 1], bool)
    score = np.array([0.1, 0.9, 0.2, 0.8, 0.3, 0.7])
    assert m.average_precision(truth, score) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    pairs = (score[truth][:, None] > score[~truth]).mean()
    assert m.roc_auc(truth, score) == pytest.approx(pairs)
    assert m.f1_score(truth, score > 0.5) == pytest.approx(2 * 2 / (3 + 3))
    best = max(m.f1_score(truth, score >= level) for level in score)
    assert m.best_f1(truth, score)[0] == pytest.approx(best)
    # events: steps 1-2 and 5; flagged 1, 3, 5 -> recall 1, precision 2/3
    assert m.event_f1(truth, score > 0.5) == pytest.approx(0.8)
    # after adjustment step 2 counts as found with 0.9: thresholds at 0.7 give 3 hits and 1 false
    assert m.f1_point_adjusted(truth, score) == pytest.approx(2 * 3 / (3 + 4))


def test_ties_count_together():
    truth = np.array([1, 0, 0, 0], bool)
    assert m.average_precision(truth, np.ones(4)) == pytest.approx(0.25)
    assert m.roc_auc(truth, np.ones(4)) == pytest.approx(0.5)
    assert np.isnan(m.average_precision(np.zeros(4, bool), np.ones(4)))


def test_random_scores_do_well_when_points_are_adjusted():
    truth = np.zeros(5000, bool)
    truth[1000:1300] = truth[3000:3300] = True
    score = np.random.default_rng(0).random(5000)
    assert m.average_precision(truth, score) < 0.2
    assert m.f1_point_adjusted(truth, score) > 0.8


def test_threshold_comes_from_the_calibration_alone():
    rng = np.random.default_rng(0)
    coords = {"series": ["s"], "variate": ["a", "b"]}
    score = xr.DataArray(rng.random((1, 400, 2)), coords, ("series", "time", "variate"))
    normal = score.isel(time=slice(0, 200))
    found = a.detect(score, normal, 0.9)
    assert float(found["threshold"][0]) == pytest.approx(np.quantile(normal.max("variate"), 0.9))
    changed = a.detect(score.where(np.arange(400)[:, None] < 200, 9.0), normal, 0.9)
    assert float(changed["threshold"][0]) == float(found["threshold"][0])
    with pytest.raises(ValueError, match="inside"):
        a.detect(score, normal, 1.0)
    with pytest.raises(ValueError, match="no calibration step"):
        a.detect(score, normal * np.nan)


def test_a_series_without_scores_is_named():
    coords = {"series": ["first", "second"], "variate": ["a"]}
    score = xr.DataArray(np.random.default_rng(0).random((2, 50, 1)), coords, ("series", "time", "variate"))
    gone = score.where(score["series"] == "first")
    with pytest.raises(ValueError, match="no calibration step of series second has a score, of 20"):
        a.detect(gone, gone.isel(time=slice(0, 20)))
    with pytest.raises(ValueError, match="of series first has a score, of 0"):
        a.detect(score, score.isel(time=slice(0, 0)))


def test_scores_without_a_common_step_are_refused():
    score = xr.DataArray(np.ones((1, 4)), dims=("series", "time"))
    parts = {
        "early": (score.where([True, True, False, False]), None),
        "late": (score.where([False] * 3 + [True]), None),
    }
    with pytest.raises(ValueError, match="no step of 4 has all of the scores early, late"):
        a.compare_scores(score > 0, parts)


def test_labels_that_are_no_flags_are_refused(tmp_path, capsys):
    ds = create_synthetic("sines", length=300, n_variates=2)
    with pytest.raises(ValueError, match="expected flags: 0 for normal"):
        a.flags_of(ds.assign(label=ds["target"].isel(variate=0, drop=True)))
    with pytest.raises(ValueError, match="dtype"):
        a.flags_of(ds.assign(label=("time", np.full(300, "no"))))
    flags = np.zeros(300)
    flags[7], flags[8] = 1, np.nan
    assert np.flatnonzero(a.flags_of(ds.assign(label=("time", flags)))).tolist() == [7]
    write_series(ds, tmp_path / "sines.nc")
    words = ["timeseries", "detect", "--data", str(tmp_path / "sines.nc"), "--out", str(tmp_path / "found.nc")]
    assert main([*words, "--label", "x0"]) == 2
    assert "expected flags" in capsys.readouterr().err
    assert main([*words, "--window", "1"]) == 2
    assert "window of at least 2 steps" in capsys.readouterr().err
    assert not (tmp_path / "found.nc").exists()


def test_rolling_z_is_a_z_score():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(60, 1))
    ds = xr.Dataset({"target": (("time", "variate"), values)}, {"time": np.arange(60), "variate": ["a"]})
    score = a.rolling_z_scores(ds, 20)
    past = values[20:40, 0]
    assert float(score[0, 40, 0]) == pytest.approx(((values[40, 0] - past.mean()) / past.std()) ** 2)
    assert np.isnan(score[0, :20]).all()


@pytest.fixture(scope="module")
def spikes():
    return create_synthetic("spikes", length=1500, n_variates=2, noise=0.05)


@pytest.fixture(scope="module")
def model(spikes):
    data = spikes.drop_vars("label").isel(time=slice(0, 600))
    return Forecaster("ridge", lookback=48, horizon=2, model_args={"steps": 24}).fit(data)


def test_spikes_stand_out_of_forecast_residuals(spikes, model):
    residual = a.forecast_scores(model, spikes.drop_vars("label"))
    assert residual.dims == ("series", "time", "variate")
    assert residual.shape == (1, 1500, 2)
    assert np.isnan(residual[0, :48]).all()
    assert np.isfinite(residual[0, 48:]).all()
    score = a.residual_scores(residual, residual.isel(time=slice(0, 600)))
    flags = a.flags_of(spikes)
    found = a.detect(score, score.isel(time=slice(0, 600)), 0.98)
    scores = {"ridge": (found["score"], found["threshold"]), "random": (a.random_scores(found["score"]), None)}
    table = a.compare_scores(flags, scores).set_index("score")
    assert table.loc["ridge", "average_precision"] > 0.6
    assert table.loc["random", "average_precision"] < 0.1
    assert table.loc["ridge", "f1"] > 0.4


def test_residual_of_a_step_is_that_of_its_own_forecast(spikes, model):
    ds = spikes.drop_vars("label").isel(time=slice(0, 100))
    residual = a.forecast_scores(model, ds)
    one = model.predict(ds.isel(time=slice(0, 60)), horizon=1)["mean"].values.reshape(-1)
    scale = np.array(model.state["scaler"]["scale"]).reshape(-1)
    expected = ((ds["target"].values[60] - one) / scale) ** 2
    np.testing.assert_allclose(residual[0, 60], expected, rtol=1e-3)


def test_verb_prints_baselines_beside(spikes, model, tmp_path, capsys):
    write_series(spikes, tmp_path / "spikes.nc")
    model.save(tmp_path / "model")
    words = ["--data", tmp_path / "spikes.nc", "--checkpoint", tmp_path / "model", "--out", tmp_path / "found.nc"]
    assert main(["timeseries", "detect", *map(str, words)]) == 0
    shown = capsys.readouterr().out
    for name in ("forecast residual", "rolling z-score", "random", "average_precision", "behind the first 40%"):
        assert name in shown
    # what is judged comes behind the calibration, whatever is flagged before
    changed = spikes.assign(label=spikes["label"] | (spikes["time"] < spikes["time"][600]))
    write_series(changed, tmp_path / "spikes.nc")
    assert main(["timeseries", "detect", *map(str, words)]) == 0
    assert capsys.readouterr().out == shown
    found = xr.open_dataset(tmp_path / "found.nc", engine="h5netcdf")
    assert {"score", "anomaly", "threshold", "label"} <= set(found.data_vars)
    assert main(["timeseries", "plot", "--data", str(tmp_path / "found.nc"), "--out", str(tmp_path / "a.png")]) == 0


def test_nab_on_its_grid(tmp_path):
    times = pd.date_range("2020-01-01", periods=20, freq="5min").delete(7)
    frame = pd.DataFrame({"timestamp": times, "value": np.arange(19.0)})
    frame = pd.concat([frame, frame.iloc[[3]].assign(value=5.0)])
    frame.to_csv(tmp_path / "one.csv", index=False)
    windows = {"known/one.csv": [["2020-01-01 00:10:00.0", "2020-01-01 00:20:00.0"]]}
    (tmp_path / "combined_windows.json").write_text(json.dumps(windows))
    ds = read_nab(tmp_path, "one")
    assert ds.sizes["time"] == 20
    assert ds.attrs["freq"] == "5min"
    assert np.isnan(ds["target"][7]).all()
    assert float(ds["target"][3, 0]) == 4.0
    assert np.flatnonzero(ds["label"]).tolist() == [2, 3, 4]
    with pytest.raises(FileNotFoundError, match="numenta"):
        read_nab(tmp_path, "two")


@pytest.mark.parametrize("name", ["nyc_taxi", "machine_temperature_system_failure"])
def test_real_nab(name, shared_data):
    root = shared_data / "nab"
    if not root.is_dir():
        pytest.skip("NAB not at hand")
    ds = read_nab(root, name)
    assert 0.05 < float(ds["label"].mean()) < 0.15


def test_reconstruction_scores(tmp_path):
    """Spikes stand out from what lies around them; no value takes part in its own reconstruction."""
    spikes = create_synthetic("spikes", length=700, n_variates=2)
    bare = spikes.drop_vars("label")
    imputer = Imputer(window=24, longest=4, model_args={"n_layer": 1, "d_model": 16})
    imputer.fit(bare, max_epochs=2, stride=2, progress=False)
    residual = a.reconstruction_scores(imputer, bare)
    assert residual.dims == ("series", "time", "variate")
    assert residual.notnull().all()
    table = a.compare_scores(
        a.flags_of(spikes),
        {
            "own": (a.residual_scores(residual).max("variate"), None),
            "random": (a.random_scores(residual).max("variate"), None),
        },
    ).set_index("score")
    assert table.loc["own", "average_precision"] > 3 * table.loc["random", "average_precision"]
    step = 301
    moved = bare.copy(deep=True)
    moved["target"][{"time": step}] += 5.0
    change = a.reconstruction_scores(imputer, moved) ** 0.5 - residual**0.5
    assert float(abs(change.isel(time=step)).min()) > 1.0  # its own score moves by the whole change
    path = imputer.save(tmp_path / "imputer")
    np.testing.assert_allclose(a.model_scores(path, bare), residual, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="at least 2 folds"):
        a.reconstruction_scores(imputer, bare, folds=1)


def test_scores_of_a_distribution_are_deviances(tmp_path):
    data = create_synthetic("spikes", length=500, n_variates=2).drop_vars("label")
    model = Forecaster("rlinear", 24, 2, distribution="normal").fit(data, max_epochs=1, progress=False)
    backtest = model.backtest(data, horizon=1, progress=False).isel(horizon=0)
    z = (backtest["target"] - backtest["mean"]) / backtest["scale"]
    expected = (z**2).transpose("series", "cutoff", "variate").to_numpy()
    found = a.model_scores(model.save(tmp_path / "model"), data)
    np.testing.assert_allclose(found.to_numpy()[:, 24:], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(found.to_numpy()[:, :24]).all()
