"""Anomaly scores of series, thresholds from normal data, and the two baselines that every report stands beside.

The score of an entry is its squared residual over the median squared residual of the calibration data, per series and
variate; over variates the largest or the mean one counts. A residual is that of a one-step forecast (of a model with a
distribution its deviance, twice the log of how much likelier the likeliest value was), or that of a reconstruction from
what lies around it. A threshold is a quantile of the scores of data
that the model was trained or calibrated on, never of those that are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from .metrics_anomaly import average_precision, best_f1, event_f1, f1_point_adjusted, f1_score, roc_auc

if TYPE_CHECKING:
    from pathlib import Path

    from .forecaster import Forecaster
    from .imputation import Imputer

Array = npt.NDArray[Any]
Pool = Literal["max", "mean"]

__all__ = [
    "compare_scores",
    "detect",
    "flags_of",
    "forecast_scores",
    "model_scores",
    "random_scores",
    "reconstruction_scores",
    "residual_scores",
    "rolling_z_scores",
]


def forecast_scores(model: Forecaster, ds: xr.Dataset) -> xr.DataArray:
    """Squared one-step residuals of a forecaster, or the deviance of each value where it forecasts a distribution.

    Args:
        model: A trained forecaster; it sees `lookback` steps before each step that is scored.
        ds: Series with the model's variates.

    Returns:
        (series, time, variate) in the units of the model's scaler (a deviance has none), NaN at the first `lookback`
        steps and where nothing was observed.
    """
    import torch

    from .distributions import find_distribution
    from .scaling import Scaler

    # A model of a longer horizon forecasts it whole; only its first step is scored.
    result = model.backtest(ds, horizon=1, intervals=False, progress=False)
    times = result["valid_time"].isel(horizon=0).to_numpy()
    scaler = Scaler.from_dict(model.state["scaler"])
    rows = scaler.rows(result)
    family = find_distribution(model.distribution)

    def read(name: str) -> Array:
        return result[name].isel(horizon=0).transpose("series", "variate", "cutoff").to_numpy().astype(np.float64)

    if family is not None and all(name in result for name in family.parameters):
        y = torch.from_numpy(np.stack([read(name) for name in family.parameters], axis=-1))
        squared = family.deviance(y, torch.from_numpy(read("target"))).numpy()
    else:
        squared = np.square(np.subtract(*(scaler.transform(read(name), rows, axis=1) for name in ("target", "mean"))))
    coords = {"series": result["series"].to_numpy(), "variate": result["variate"].to_numpy(), "time": times}
    scores = xr.DataArray(squared, coords, ("series", "variate", "time"), name="score")
    return scores.reindex(time=ds["time"].to_numpy()).transpose("series", "time", "variate")


def reconstruction_scores(imputer: Imputer, ds: xr.Dataset, block: int | None = None, folds: int = 4) -> xr.DataArray:
    """Squared residuals of every value from its reconstruction by what lies around it.

    Blocks of steps are hidden in turn, all variates together, and filled in from the rest, averaged over overlapping
    windows: no value has a part in its own reconstruction, and none is without one.

    Args:
        imputer: A trained imputer.
        ds: Series with the model's variates.
        block: Steps hidden together; None takes half the longest block that the imputer has learned to fill.
        folds: Passes; in each, one block in so many is hidden.

    Returns:
        (series, time, variate) in the units of the model's scaler, NaN where nothing was observed.

    Raises:
        ValueError: if a number is out of range.
    """
    from .scaling import Scaler
    from .schema import canonical

    block = max(1, imputer.longest // 2) if block is None else block
    if block < 1 or folds < 2:
        raise ValueError(f"expected blocks of at least 1 step and at least 2 folds, got {block} and {folds}")
    ds = canonical(canonical(ds).sel(variate=imputer.state["variates"]))
    target = ds["target"]
    fold = xr.DataArray(np.arange(ds.sizes["time"]) // block % folds, dims="time")
    rebuilt = xr.full_like(target, np.nan)
    for k in range(folds):
        kept = canonical(ds.drop_vars("observed").assign(target=target.where(fold != k)))
        filled = imputer.impute(kept)["target"].transpose(*target.dims)
        rebuilt = rebuilt.where(fold != k, filled)
    scaler = Scaler.from_dict(imputer.state["scaler"])
    rows = scaler.rows(ds)
    scaled = [scaler.transform(each.to_numpy().astype(np.float64), rows, axis=2) for each in (target, rebuilt)]
    return target.copy(data=np.square(scaled[0] - scaled[1])).rename("score")


def model_scores(path: str | Path, ds: xr.Dataset) -> xr.DataArray:
    """Residuals of a saved model: one-step ones of a forecaster, those of reconstructions by an imputer.

    Args:
        path: Model folder, folder of a run, or .ckpt file.
        ds: Series with the model's variates.

    Returns:
        As these functions, with the attribute `of`, "forecast" or "reconstruction".
    """
    from .forecast import load
    from .imputation import Imputer
    from .loading import read_run

    task = read_run(path, ("forecasting", "imputation")).config.get("task", {})
    if task.get("kind") == "imputation":
        return reconstruction_scores(Imputer.load(path), ds).assign_attrs(of="reconstruction")
    return forecast_scores(load(path), ds).assign_attrs(of="forecast")


def residual_scores(residual: xr.DataArray, calibration: xr.DataArray | None = None) -> xr.DataArray:
    """Squared residuals in units of their usual size, so that variates compare.

    Args:
        residual: Squared, with dimensions time and variate.
        calibration: Those of normal data, whose median per series and variate is 1; None takes `residual` itself.
    """
    median = (residual if calibration is None else calibration).median("time")
    return residual / median.where(median > 0, 1.0)


def rolling_z_scores(ds: xr.Dataset, window: int = 96) -> xr.DataArray:
    """Squared deviation from the mean of the `window` observed steps before, in their deviation; a baseline.

    The first `window` steps are NaN, and so is what was not observed. Deviations count as at least a thousandth of that
    of the whole series.

    Raises:
        ValueError: if the window is shorter than 2 steps.
    """
    if window < 2:
        raise ValueError(f"expected a window of at least 2 steps, got {window}")
    target = ds["target"] if "series" in ds["target"].dims else ds["target"].expand_dims(series=["0"])
    target = target.transpose("series", "time", "variate").astype(np.float64)
    past = target.shift(time=1).rolling(time=window, min_periods=2)
    spread = past.std()
    scale = target.std("time") * 1e-3  # a constant stretch must not make each later change infinite
    score = ((target - past.mean()) / spread.clip(min=scale.where(scale > 0, 1.0))) ** 2
    return score.where(np.arange(score.sizes["time"])[None, :, None] >= window).rename("score")


def random_scores(like: xr.DataArray, seed: int = 0) -> xr.DataArray:
    """Uniform random scores where `like` has one; what they reach is what a measure gives away."""
    return like.copy(data=np.random.default_rng(seed).random(like.shape)).where(like.notnull())


def detect(score: xr.DataArray, calibration: xr.DataArray, quantile: float = 0.995, pool: Pool = "max") -> xr.Dataset:
    """Scores over variates, and which steps pass the threshold.

    Args:
        score: (series, time, variate), NaN where there is none.
        calibration: Scores of data from before, e.g. those that the model was trained on.
        quantile: Share of the calibration steps that stay below the threshold.
        pool: "max" or "mean" over variates.

    Returns:
        `score` and `anomaly` over (series, time), `variate_score` over (series, time, variate), and `threshold` per
        series.

    Raises:
        ValueError: if the quantile is no share, or there is nothing to calibrate with.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile is a share inside (0, 1), got {quantile}")
    if pool not in ("max", "mean"):
        raise ValueError(f"pool must be 'max' or 'mean', got {pool!r}")
    reduce: dict[str, Callable[[xr.DataArray], xr.DataArray]] = {
        "max": lambda part: part.max("variate"),
        "mean": lambda part: part.mean("variate"),
    }
    pooled, normal = reduce[pool](score), reduce[pool](calibration)
    usable = np.atleast_1d(normal.notnull().any("time").to_numpy())
    if not usable.all():
        name = score["series"].to_numpy()[int(usable.argmin())] if "series" in score.coords else usable.argmin()
        raise ValueError(
            f"no calibration step of series {name!s} has a score, of {normal.sizes['time']}; the first steps have none "
            "for want of a full lookback or window: calibrate with a longer stretch, or leave out an empty series"
        )
    threshold = normal.quantile(quantile, "time").drop_vars("quantile")
    about = {"quantile": quantile, "pool": pool}
    return xr.Dataset(
        {
            "score": pooled,
            "anomaly": pooled > threshold,
            "variate_score": score,
            "threshold": threshold,
        },
        attrs=about,
    )


def flags_of(ds: xr.Dataset) -> xr.DataArray:
    """True at anomalous steps, (series, time): `label` of any variate; a missing flag counts as none.

    Raises:
        ValueError: if the data have no flags over time, or other labels than 0 and 1.
    """
    if "label" not in ds or "time" not in ds["label"].dims:
        raise ValueError("the data have no variable 'label' over time; flags are needed to measure anomaly scores")
    values = ds["label"].to_numpy()
    if values.dtype.kind not in "biuf":
        raise ValueError(f"'label' has dtype {values.dtype}, expected flags 0 and 1, or bool")
    wrong = values[~(np.isin(values, (0, 1)) | np.isnan(values))]
    if wrong.size:
        raise ValueError(f"'label' holds {wrong[0]:g}, expected flags: 0 for normal and 1 for anomalous steps")
    label = ds["label"] == 1
    label = label.any("variate") if "variate" in label.dims else label
    label = label if "series" in label.dims else label.expand_dims(series=_series(ds))
    return label.transpose("series", "time")


def compare_scores(flags: xr.DataArray, scores: dict[str, tuple[xr.DataArray, xr.DataArray | None]]) -> pd.DataFrame:
    """Several scores of the same series, measured at the steps that all of them have.

    Args:
        flags: (series, time), see `flags_of`.
        scores: Name to scores (series, time), and the threshold per series or None.

    Returns:
        A row per score: average precision, area under the ROC curve, F1 at the threshold (NaN without), best F1 over
        all thresholds, F1 of events with as many steps flagged as are anomalous and, beside these only, the
        point-adjusted F1, which random scores do well in too.

    Raises:
        ValueError: if no step has all scores.
    """
    known = np.logical_and.reduce([score.transpose("series", "time").notnull() for score, _ in scores.values()])
    if not known.any():
        raise ValueError(f"no step of {flags.sizes['time']} has all of the scores {', '.join(scores)}; take more")
    truth = flags.to_numpy()
    rows = []
    for name, (score, threshold) in scores.items():
        values = np.where(known, score.transpose("series", "time").to_numpy(), -np.inf)
        flat, own = truth[known], values[known]
        # As many steps flagged as are anomalous: a score that flags everything would touch every event.
        level = np.sort(own)[-max(1, int(flat.sum()))]
        flagged = None if threshold is None else (score > threshold).transpose("series", "time").to_numpy()[known]
        rows.append(
            {
                "score": name,
                "average_precision": average_precision(flat, own),
                "roc_auc": roc_auc(flat, own),
                "f1": float("nan") if flagged is None else f1_score(flat, flagged),
                "best_f1": best_f1(flat, own)[0],
                "event_f1": event_f1(truth & known, values >= level),
                "f1_point_adjusted": f1_point_adjusted(truth & known, np.where(known, values, -np.inf)),
                "anomalous": float(flat.mean()),
            }
        )
    return pd.DataFrame(rows)


def _series(ds: xr.Dataset) -> list[str]:
    return [str(name) for name in ds["series"].to_numpy()] if "series" in ds.dims else ["0"]
