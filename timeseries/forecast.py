"""The verbs as functions: forecast what follows a series, backtest over its past, evaluate the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

    from .forecaster import Forecaster
    from .splits import Cut

__all__ = ["backtest", "evaluate", "forecast", "load"]


def forecast(
    model: Forecaster | str | Path,
    data: Any,
    horizon: int | None = None,
    future: xr.Dataset | xr.DataArray | None = None,
    intervals: bool | None = None,
    samples: int = 0,
) -> Any:
    """Forecast what follows the end of the data; see `Forecaster.predict`.

    Args:
        model: A fitted forecaster, a model folder, a run's folder or a checkpoint.
        data: Dataset in the schema, DataArray, frame or path of a file.
        horizon: Steps; default the trained horizon.
        future: Future-known covariates of these steps.
        intervals: True demands conformal intervals, False leaves them out.
        samples: Number of draws from the model's distribution, as variable `samples`.

    Returns:
        A forecast of the same kind as `data`: Dataset, or long frame for a long frame.
    """
    return load(model).predict(data, future, horizon, intervals=intervals, samples=samples)


def backtest(
    model: Forecaster | str | Path,
    data: Any,
    start: Cut | None = None,
    stride: int = 1,
    refit: bool | int = False,
    horizon: int | None = None,
    intervals: bool | None = None,
    progress: bool = True,
) -> Any:
    """Forecast from many past cutoffs and keep what then came beside it; see `Forecaster.backtest`.

    Args:
        model: A fitted forecaster, a model folder, a run's folder or a checkpoint.
        data: Dataset in the schema, DataArray, frame or path of a file.
        start: First step to forecast: a time, a step number or a share of the data.
        stride: Steps from one cutoff to the next.
        refit: Train anew every so many cutoffs; False keeps the model.
        horizon: Steps; default the trained horizon.
        intervals: True demands conformal intervals, False leaves them out.
        progress: Show a bar on stderr.

    Returns:
        A forecast with targets, of the same kind as `data`.
    """
    return load(model).backtest(data, start, stride, refit, horizon, intervals=intervals, progress=progress)


def evaluate(
    forecast: xr.Dataset,
    metrics: str | Sequence[str] = ("mse", "mae"),
    by: str | Sequence[str] = ("variate", "horizon"),
) -> xr.Dataset:
    """Errors of a forecast that carries its targets.

    Args:
        forecast: Forecast Dataset, e.g. of `backtest`.
        metrics: One or several of `evaluation.METRICS`. `mse`, `rmse`, `mae` and `crps` are in the units of the model's
            scaler, where the forecast names one; the same with `_units`, and `nll`, in those of the data. `crps` is
            that of the distribution of a forecast, else of its samples, else of its quantiles. The interval metrics
            take the widest interval, or one that is named: `coverage@0.9`.
        by: Dimensions to keep, one or several of series, cutoff, horizon and variate; () gives one number over all
            windows.

    Returns:
        Dataset with one float64 variable per metric over the dimensions `by`, NaN where nothing was observed.

    Raises:
        ValueError: for unknown metrics or dimensions, and where the forecast lacks what a metric needs.
    """
    from .evaluation import compute_errors

    return compute_errors(forecast, metrics, by)


def load(model: Forecaster | str | Path) -> Forecaster:
    """A forecaster as it is, from a model folder, or from a run's folder or checkpoint by way of a model folder.

    Of a run's folder, `model/` is read unless the run's best checkpoint is newer.
    """
    import tempfile

    from ..ssmcore.training.checkpoints import CONFIG, export_checkpoint
    from ..ssmcore.training.export import best_checkpoint
    from .forecaster import Forecaster

    if isinstance(model, Forecaster):
        return model
    path = Path(model)
    if not path.exists():
        raise FileNotFoundError(f"no model at {str(path)!r}; give a model folder, a run's folder or a .ckpt file")
    if (path / CONFIG).is_file():
        return Forecaster.load(path)
    config = path / "model" / CONFIG
    try:
        checkpoint = best_checkpoint(path)
    except FileNotFoundError:
        if config.is_file():  # a run without its checkpoints
            return Forecaster.load(config.parent)
        raise
    if config.is_file() and config.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns:
        return Forecaster.load(config.parent)
    with tempfile.TemporaryDirectory() as scratch:
        return Forecaster.load(export_checkpoint(checkpoint, Path(scratch) / "model"))


def run_data(run: str | Path) -> tuple[xr.Dataset, range | None]:
    """Series of the data module that a run was trained on, and the steps of its test part, if it has one.

    Args:
        run: Folder of a run; its `config.yaml` names the data module.

    Raises:
        ValueError: if `run` is no such folder.
    """
    from ..ssmcore.training.data import data_class
    from ..ssmcore.training.runs import read_yaml
    from .data import ForecastingData

    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{str(run)!r} is not a run's folder (no config.yaml), so its data are unknown; give --data FILE"
        )
    section = read_yaml(path).get("data")
    if not isinstance(section, dict):
        raise ValueError(f"{path} names no data module; give --data FILE")
    try:
        kind = data_class(str(section.get("class_path")))
    except ValueError as error:
        raise ValueError(f"{path} names the {error}") from None
    if not issubclass(kind, ForecastingData):
        raise ValueError(f"{path} names {kind.__name__}, which has no series to forecast; give --data FILE")
    data = kind(**section.get("init_args", {}))
    data.setup()
    return data.read(), data.parts["test"].targets if "test" in data.parts else None
