"""Forecast New York weather with Chimera, beside the day before; needs omnissm[demo] and a minute on a CPU."""

from omnissm.timeseries import Forecaster
from omnissm.timeseries.data import read_nyc_weather

series = read_nyc_weather().isel(time=slice(0, 4000))
chimera = Forecaster(
    "chimera_tiny",
    lookback=72,
    horizon=24,
    fill="forward",
    model_args={"patch_len": 12, "stride": 6, "instance_norm": False, "linear_skip": 24},
)
naive = Forecaster("seasonal_naive", lookback=72, horizon=24, fill="forward")
for model in (chimera, naive):
    model.fit(series.isel(time=slice(0, 3200)), max_epochs=1)
    backtest = model.backtest(series, start=3200, stride=24)
    errors = model.evaluate(backtest, metrics=("mse", "mae"), by=())
    print(model.model, {name: round(float(errors[name]), 3) for name in errors})
chimera.predict(series)["mean"].to_dataframe().to_csv("forecast.csv")
