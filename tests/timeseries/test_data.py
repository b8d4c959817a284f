import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from omnissm.timeseries.data import ETT, NetCDF, NYCWeather, Synthetic, Table
from omnissm.timeseries.data.nyc_weather import read_nyc_weather
from omnissm.timeseries.data.synthetic import KINDS, create_synthetic
from omnissm.timeseries.files import write_series
from omnissm.timeseries.frames import from_numpy
from omnissm.timeseries.rollout import create_windows, prepare
from omnissm.timeseries.scaling import Scaler
from omnissm.timeseries.schema import canonical, validate
from omnissm.timeseries.windows import WindowBatch, Windows


def last_value(batch: WindowBatch) -> torch.Tensor:
    return batch.x[..., -1:].expand_as(batch.y)


def seasonal_naive(batch: WindowBatch) -> torch.Tensor:
    steps = torch.arange(batch.y.shape[-1]) % 24
    return batch.x[..., batch.x.shape[-1] - 24 + steps]


def window_mean(batch: WindowBatch) -> torch.Tensor:
    return batch.x.mean(-1, keepdim=True).expand_as(batch.y)


def errors(windows: Windows, forecast) -> tuple[float, float]:
    """MSE and MAE over the observed targets of all windows."""
    squares = sizes = count = 0.0
    for batch in windows.batches(256):
        error = (forecast(batch) - batch.y)[batch.y_mask].double()
        squares += error.square().sum().item()
        sizes += error.abs().sum().item()
        count += error.numel()
    return squares / count, sizes / count


@pytest.fixture
def ett(shared_data):
    folder = shared_data / "ett"
    if not (folder / "ETTh1.csv").is_file():
        pytest.skip(f"no ETTh1.csv in {folder}")
    return str(folder)


@pytest.fixture
def weather():
    try:
        return read_nyc_weather()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "horizon", "last", "seasonal", "counts"),
    [
        ("ETTh1", 96, (1.29437, 0.71318), (0.51223, 0.43330), (8449, 2785, 2785)),
        ("ETTh1", 336, (1.32993, 0.74597), (0.64991, 0.50076), (8209, 2545, 2545)),
        ("ETTh2", 192, (0.53372, 0.47254), (0.48186, 0.42854), (8353, 2689, 2689)),
    ],
)
def test_ett_protocol(ett, name, horizon, last, seasonal, counts):
    data = ETT(ett, name, lookback=96, horizon=horizon)
    assert tuple(len(data.windows(part)) for part in ("train", "val", "test")) == counts
    assert errors(data.windows("test"), last_value) == pytest.approx(last, abs=1e-4)
    assert errors(data.windows("test"), seasonal_naive) == pytest.approx(seasonal, abs=1e-4)


def test_ett_facts_are_known_before_the_file_is_read(tmp_path):
    data = ETT(str(tmp_path), "ETTm1")
    assert data.variates == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    assert (data.n_variates, data.freq, data.season) == (7, "15min", 96)
    assert data.cuts == {"train": 34560, "val": 11520, "test": 11520}
    with pytest.raises(FileNotFoundError, match="ETDataset"):
        data.prepare_data()
    with pytest.raises(ValueError, match="Unknown ETT file 'ETTh3'"):
        ETT(str(tmp_path), "ETTh3")


def test_weather_protocol(weather):
    data = NYCWeather()
    windows = data.windows("test")
    assert len(windows) == 5169
    assert data.freq == "h"
    assert errors(windows, last_value) == pytest.approx((0.846, 0.503), abs=1e-3)
    assert errors(windows, seasonal_naive) == pytest.approx((1.219, 0.665), abs=1e-3)
    assert errors(windows, window_mean) == pytest.approx((1.025, 0.674), abs=1e-3)


def test_weather_has_its_real_defects(weather):
    validate(weather)
    assert dict(weather.sizes) == {"series": 3, "time": 8730, "variate": 7}
    missing_hours = weather["target"].isnull().all("variate").sum("time").to_numpy()
    assert missing_hours.tolist() == [27, 24, 24]
    assert 0.09 < float(weather.sel(variate="pressure")["target"].isnull().mean()) < 0.12
    assert float(weather.sel(variate="wind_speed")["target"].max()) < 100.0  # the 1048 mph at EWR is missing
    assert weather["units"].sel(variate="temp").item() == "degF"


def test_weather_from_a_path_and_for_some_stations(tmp_path):
    hours = pd.date_range("2013-01-01T06:00Z", periods=30, freq="h").strftime("%Y-%m-%dT%H:%M:%SZ")
    columns = ["temp", "dewp", "humid", "wind_speed", "pressure", "visib", "precip"]
    rows = pd.DataFrame(np.ones((30, 7)), columns=columns).assign(
        origin="JFK", time_hour=hours, wind_speed=[1048.0] + [5.0] * 29
    )
    rows.drop(index=4).to_csv(tmp_path / "weather.csv", index=False)
    ds = read_nyc_weather(str(tmp_path), ["JFK"])
    assert np.flatnonzero(ds["target"].isnull().any("variate").to_numpy()[0]).tolist() == [0, 4]
    with pytest.raises(FileNotFoundError, match=r"weather\.csv"):
        read_nyc_weather(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="Unknown station 'SFO'"):
        NYCWeather(stations=["SFO"])


def test_missing_weather_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "omnissm\[demo\]"'):
        read_nyc_weather()


def _changed(ds: xr.Dataset, first: int) -> xr.Dataset:
    values = ds["target"].to_numpy().copy()
    values[..., first:, :] = 1e3 * np.random.default_rng(9).normal(size=values[..., first:, :].shape)
    return ds.assign(target=ds["target"].copy(data=values))


def test_test_values_change_no_training_batch_and_no_scaler(monkeypatch):
    original = create_synthetic(length=400)
    one, other = Synthetic(length=400), Synthetic(length=400)
    monkeypatch.setattr(other, "read", lambda: _changed(original, 280))  # from the first validation target on
    for part in ("train", "val"):
        assert len(one.windows(part)) == len(other.windows(part))
    assert one.state() == other.state()
    for mine, yours in zip(one.train_dataloader(), other.train_dataloader(), strict=True):
        for a, b in zip(mine, yours):
            assert a is b is None or torch.equal(a, b)
    assert not torch.equal(one.windows("test")[0].y, other.windows("test")[0].y)
    monkeypatch.setattr(other, "read", lambda: _changed(original, 279))  # and the last training value does change them
    vars(other).pop("dataset")
    other.parts, other._windows = {}, {}
    assert one.state() != other.state()


def test_parts_share_no_target():
    data = Synthetic(length=400)
    steps = {}
    for part in ("train", "val", "test"):
        batch = data.windows(part).get_batch(range(len(data.windows(part))))
        steps[part] = {int(o) + 1 + h for o in batch.origin for h in range(data.horizon)}
    assert not steps["train"] & steps["val"]
    assert not steps["val"] & steps["test"]
    assert min(steps["val"]) == max(steps["train"]) + 1
    assert min(steps["test"]) == max(steps["val"]) + 1


def test_training_order_follows_seed_and_epoch():
    def origins(data: Synthetic, epoch: int) -> list[int]:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch.origin for batch in loader]).tolist()

    first = origins(Synthetic(length=300), 0)
    assert sorted(first) == list(range(47, 47 + len(first)))
    assert origins(Synthetic(length=300), 0) == first
    assert origins(Synthetic(length=300), 1) != first
    assert origins(Synthetic(length=300, seed=1), 0) != first
    assert origins(Synthetic(length=300, num_workers=2), 0) == first


def test_evaluation_sees_every_window_in_order():
    data = Synthetic(length=300, batch_size=7)
    batches = list(data.test_dataloader())
    assert torch.equal(torch.cat([batch.y for batch in batches]), data.windows("test").get_batch(range(37)).y)


def test_state_is_json_and_rebuilds_the_scaler():
    data = Synthetic(length=300, scaler="robust", calendar=True, fourier=[24])
    state = json.loads(json.dumps(data.state()))
    assert state["variates"] == ["x0", "x1", "x2", "x3"]
    assert (state["freq"], state["season"], state["lookback"], state["horizon"], state["fill"]) == (
        "h",
        24,
        48,
        24,
        "zero",
    )
    values = data.dataset["target"].to_numpy()
    again = Scaler.from_dict(state["scaler"])
    np.testing.assert_array_equal(again.transform(values), data.scaler.transform(values))
    assert state["time_features"] == {"calendar": True, "fourier": [24], "zone": None}
    assert data.windows("test")[0].future.shape == (7, 72)


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_sets_are_seeded_and_valid(kind):
    ds = create_synthetic(kind, length=500, seed=3)
    validate(ds)
    xr.testing.assert_identical(ds, create_synthetic(kind, length=500, seed=3))
    assert not ds["target"].equals(create_synthetic(kind, length=500, seed=4)["target"])
    assert dict(ds.sizes) == {"time": 500, "variate": 4}
    data = Synthetic(kind=kind, length=500)
    assert data.n_variates == 4
    assert torch.isfinite(next(iter(data.train_dataloader())).x).all()


def test_each_synthetic_set_holds_what_it_promises():
    lagged = create_synthetic("lagged_graph", length=3000)["target"].to_numpy()
    assert np.corrcoef(lagged[:-24, 0], lagged[24:, 1])[0, 1] > 0.99
    assert abs(np.corrcoef(lagged[:-24, 1], lagged[24:, 1])[0, 1]) < 0.3  # its own past says little
    clean, holed = create_synthetic("sines")["target"].to_numpy(), create_synthetic("blackout")["target"].to_numpy()
    missing = np.isnan(holed)
    assert clean[missing].mean() > clean[~missing].mean() + 0.5
    spiky = create_synthetic("spikes")
    jumps = np.abs(spiky["target"].to_numpy() - clean)
    assert (jumps[~spiky["label"].to_numpy()] == 0).all()
    assert jumps[spiky["label"].to_numpy()].min() > 2.9 * clean.std(axis=0).min()
    with pytest.raises(ValueError, match="Unknown synthetic set 'noise'"):
        create_synthetic("noise")


def test_tables_wide_and_long(tmp_path):
    ds = create_synthetic(length=300)
    write_series(ds, tmp_path / "wide.csv", layout="wide")
    wide = Table(str(tmp_path / "wide.csv"), time="time", lookback=24, horizon=12)
    assert (wide.variates, wide.freq, wide.season) == (["x0", "x1", "x2", "x3"], "h", 24)
    write_series(ds, tmp_path / "long.parquet")
    long = Table(str(tmp_path / "long.parquet"), time="ds", ids="variates", lookback=24, horizon=12)
    for part in ("train", "val", "test"):
        assert torch.equal(wide.windows(part)[0].x, long.windows(part)[0].x)
    assert len(wide.windows("test")) == 60 - 12 + 1


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_files_in_memory_and_lazily_give_the_same_batches(tmp_path, suffix):
    ds = canonical(
        xr.concat([create_synthetic("blackout", length=300, seed=s) for s in (0, 1)], "series").assign_coords(
            series=["a", "b"]
        )
    )
    path = str(write_series(ds, tmp_path / f"f{suffix}"))
    eager, lazy = (NetCDF(path, lazy=lazy, lookback=24, horizon=12, min_observed=0.5) for lazy in (False, True))
    assert eager.n_variates == lazy.n_variates == 4
    assert eager.state() == lazy.state()
    assert None not in eager.state()["seasonal_errors"]["seasonal_mae"][1]
    for a, b in zip(eager.windows("train").get_batch([3, 9, 200]), lazy.windows("train").get_batch([3, 9, 200])):
        assert a is b is None or torch.equal(a, b)
    with pytest.raises(ValueError, match="lazy=True cannot add"):
        NetCDF(path, lazy=True, calendar=True)


def test_covariates_are_scaled_on_the_training_part_and_steps_beyond_the_last_target_are_no_targets():
    class Known(Synthetic):
        def read(self) -> xr.Dataset:
            ds = create_synthetic(length=320)
            hidden = ds["target"].where(np.arange(320)[:, None] < 300)
            price = np.arange(320.0)[:, None]
            return ds.assign(target=hidden, future=(("time", "future_feature"), price)).assign_coords(
                future_feature=["price"]
            )

    data = Known(train=200, val=None, test=50)
    assert data.windows("test")[len(data.windows("test")) - 1].origin == 300 - 24 - 1
    prices = data.windows("train").get_batch([0]).future[0, 0].numpy()
    np.testing.assert_allclose(prices, (np.arange(72) - 99.5) / np.std(np.arange(200)), rtol=1e-5)
    assert data.state()["covariate_scalers"]["future"]["variates"] == ["price"]


def test_a_part_that_was_left_out_is_named():
    with pytest.raises(ValueError, match="no part 'val', only train, test"):
        Synthetic(train=0.8, val=0, test=0.2).windows("val")
    with pytest.raises(ValueError, match="Did you mean 'standard'"):
        Synthetic(scaler="standart")


def test_windows_come_without_lightning():
    import subprocess
    import sys

    code = (
        "import sys, omnissm.timeseries.windows, omnissm.timeseries.files; sys.exit('pytorch_lightning' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _stored_without_freq(tmp_path) -> str:
    ds = create_synthetic(length=200)
    del ds.attrs["freq"]
    return str(write_series(ds, tmp_path / "plain.nc"))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_file_without_freq_has_the_one_its_times_follow(tmp_path, lazy):
    data = NetCDF(_stored_without_freq(tmp_path), lazy=lazy, lookback=24, horizon=12)
    assert (data.freq, data.season, data.state()["base_step"]) == ("h", 24, None)
    assert data.windows("train")[0].time_gap is None


def test_features_of_new_data_follow_the_frequency_of_the_training_data(tmp_path):
    data = NetCDF(_stored_without_freq(tmp_path), lookback=24, horizon=12, calendar=True)
    state = data.state()
    for freq, model in (("60min", "h"), (None, "h"), ("h", None)):
        ds = prepare(data.read().assign_attrs(freq=freq), {**state, "freq": model})
        future = create_windows(ds, {**state, "freq": model}, range(200), 12)[0][0].future
        assert len(future) == (6 if model is None else 5)


def test_elapsed_time_is_counted_in_the_step_of_the_training_data_everywhere():
    class Irregular(Synthetic):
        def read(self) -> xr.Dataset:
            times = np.datetime64("2020-01-01", "ns") + np.cumsum([1, 1, 1, 2] * 80).astype("timedelta64[h]")
            return from_numpy(np.random.default_rng(0).normal(size=(320, 1)), times=times, variates=["a"])

    data = Irregular(lookback=8, horizon=4, fourier=[6])
    state = json.loads(json.dumps(data.state()))
    assert (state["freq"], state["base_step"]) == (None, 3600e9)
    assert data.windows("train")[0].time_gap.tolist() == [1, 1, 1, 2, 1, 1, 1, 2]
    slow = from_numpy(np.zeros((20, 1)), start="2021-01-01", freq="6h", variates=["a"])
    batch = create_windows(prepare(slow, state), state, range(20), 4)[0][0]
    assert batch.time_gap.tolist() == [1] + [6] * 7
    assert torch.allclose(batch.future, batch.future[:, :1], atol=1e-5)  # a period is 6 h, so is each step here
