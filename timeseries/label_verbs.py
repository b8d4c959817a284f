"""The verbs `classify`, `detect`, `impute` and `convert`: plain typed functions on files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import xarray as xr

from .files import write_series
from .tables import print_table, write_table
from .ts_files import read_ts, write_ts
from .verbs import Ids, read_file

__all__ = ["classify", "convert", "detect", "impute"]

BASELINES = ("last_value", "linear")
SERIES = (".nc", ".zarr", ".csv", ".parquet")


def classify(checkpoint: Path, data: Path, out: str = "classes.csv") -> None:
    """Classify whole series, and print the accuracy where their labels are known.

    Args:
        checkpoint: Model folder, run folder or .ckpt file of a classifier.
        data: Series: a .ts file, or .nc or .zarr with dimension `series`.
        out: Table with the class and the probabilities of each series: .csv or .md; or - for CSV on standard output.

    Raises:
        ValueError: if the file or the model cannot be used; the line says why.

    Example:
      omnissm timeseries classify --checkpoint runs/NAME --data BasicMotions_TEST.ts --out classes.csv
    """
    from .classification import Classifier

    _check(out, (".csv", ".md"), stdout=True)
    frame = Classifier.load(checkpoint).predict(_read(data))
    if out == "-":
        frame.to_csv(sys.stdout, index=False)
        return
    write_table(frame, out)
    sys.stdout.write(f"{out}\n")
    if "label" in frame:
        right = (frame["label"] == frame["predicted"]).mean()
        sys.stdout.write(f"accuracy {right:.4f} of {len(frame)} series\n")


def detect(
    data: Path,
    checkpoint: Path | None = None,
    out: str = "anomalies.nc",
    calibration: float = 0.4,
    quantile: float = 0.995,
    pool: Literal["max", "mean"] = "max",
    window: int = 96,
    label: str | None = None,
    time: str | None = None,
    ids: Ids | None = None,
    id_column: str = "unique_id",
    values: list[str] | None = None,
    freq: str | None = None,
) -> None:
    """Score each step of a file's series by how far it lies from what a model expects, and flag the extremes.

    Args:
        data: Series: .nc, .zarr, .csv or .parquet.
        checkpoint: Model folder, run folder or .ckpt file of a forecaster, or of an imputer whose reconstructions are
            compared with the data. Left out, the scores are rolling z-scores.
        out: Where scores and flags go: .nc or .zarr; .csv has a row per series and step.
        calibration: First share of the steps, taken as normal: the threshold comes from its scores.
        quantile: Share of these steps that stays below the threshold.
        pool: How the variates of a step count together, by their largest score or its mean.
        window: Steps before, of the rolling z-score.
        label: Variable or column with true flags. Where .nc or .zarr have the variable `label` it is used without
            being named. A table of measures of the steps behind the calibration is then printed, beside random scores
            and rolling z-scores.
        time: Column with the times of a table.
        ids: A long table's ids are "variates" of one system or separate "series"; left out, the table is wide.
        id_column: Column with the ids of a long table.
        values: Columns with the values of a table.
        freq: Frequency of the times.

    Raises:
        ValueError: if the file or the model cannot be used; the line says why.

    Example:
      omnissm timeseries detect --checkpoint runs/NAME --data machine.csv --time timestamp --out anomalies.nc
    """
    from . import anomalies
    from .schema import canonical, validate

    _check(out, (".nc", ".zarr", ".csv"))
    if not 0 < calibration < 1:
        raise ValueError(f"calibration is a share inside (0, 1), got {calibration}")
    ds = _flagged(read_file(data, time, ids, id_column, values, freq), label)
    validate(ds)
    ds = canonical(ds)
    flags = anomalies.flags_of(ds) if "label" in ds else None
    first = int(calibration * ds.sizes["time"])
    simple = anomalies.rolling_z_scores(ds, window)
    score, kind = simple, ""
    if checkpoint is not None:
        score = anomalies.model_scores(checkpoint, ds.drop_vars("label", errors="ignore"))
        kind = score.attrs["of"]
        score = anomalies.residual_scores(score, score.isel(time=slice(0, first)))
    found = anomalies.detect(score, score.isel(time=slice(0, first)), quantile, pool)
    normal = (
        found if checkpoint is None else anomalies.detect(simple, simple.isel(time=slice(0, first)), quantile, pool)
    )
    found.attrs |= {"calibration": calibration, "model": "rolling_z" if checkpoint is None else str(checkpoint)}
    if out.endswith(".csv"):
        write_table(found[["score", "anomaly"]].to_dataframe().reset_index(), out)
    else:
        found["target"] = ds["target"]
        if flags is not None:
            found["label"] = flags
        write_series(found, out)
    sys.stdout.write(f"{out}\n")
    if flags is None:
        return
    scores: dict[str, tuple[xr.DataArray, xr.DataArray | None]] = {}
    if checkpoint is not None:
        scores[f"{kind} residual"] = (found["score"], found["threshold"])
    scores["rolling z-score"] = (normal["score"], normal["threshold"])
    scores["random"] = (anomalies.random_scores(found["score"]), None)
    judged = slice(first, None)  # never the steps that the threshold comes from
    table = anomalies.compare_scores(
        flags.isel(time=judged), {name: (score.isel(time=judged), mark) for name, (score, mark) in scores.items()}
    )
    print_table(table, f"{data}: measures by step, behind the first {calibration:.0%}")


def impute(
    data: Path,
    out: str = "filled.nc",
    checkpoint: Path | None = None,
    method: str = "linear",
    hide: float = 0.0,
    block: int = 12,
    seed: int = 0,
    time: str | None = None,
    ids: Ids | None = None,
    id_column: str = "unique_id",
    values: list[str] | None = None,
    freq: str | None = None,
) -> None:
    """Fill the gaps of a file's series.

    Args:
        data: Series: .nc, .zarr, .csv or .parquet.
        out: Where the filled series go: .nc, .zarr, .csv or .parquet; the first two say what was filled (`imputed`).
        checkpoint: Model folder, run folder or .ckpt file of an imputer. Left out, `method` fills.
        method: "linear", "last_value", or a linear-Gaussian state-space model fitted to each series, "kalman", or
            "kalman_mnar" for gaps that depend on the level.
        hide: Share of the blocks of observed steps to hide first, to see how well they are found again; their errors
            are printed beside those of the simple methods, and the file is filled with them in place. Of a model they
            say how good it is where it was not trained on these data.
        block: Steps of such a block.
        seed: Seed of these blocks.
        time: Column with the times of a table.
        ids: A long table's ids are "variates" of one system or separate "series"; left out, the table is wide.
        id_column: Column with the ids of a long table.
        values: Columns with the values of a table.
        freq: Frequency of the times.

    Raises:
        ValueError: if the file or the model cannot be used; the line says why.

    Example:
      omnissm timeseries impute --checkpoint runs/NAME --data weather.nc --out filled.nc --hide 0.1
    """
    from .imputation import METHODS, Imputer, compare_imputations, hide_blocks

    _check(out, SERIES)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected {' or '.join(METHODS)}, or give --checkpoint")
    fill = METHODS[method] if checkpoint is None else Imputer.load(checkpoint).impute
    ds = read_file(data, time, ids, id_column, values, freq)
    name = method if checkpoint is None else str(checkpoint)
    if hide:
        gappy, truth = hide_blocks(ds, hide, block, seed)
        found = {
            name: fill(gappy),
            **{each: METHODS[each](gappy) for each in BASELINES if each != name},
        }
        print_table(compare_imputations(truth, found), f"{data}: errors at hidden values, in standard deviations")
    filled = fill(ds)
    if Path(out).suffix in (".nc", ".zarr"):
        write_series(filled, out)
    else:
        one = filled.isel(series=0) if filled.sizes["series"] == 1 else filled
        write_series(one[["target"]], out, layout="wide" if "series" not in one.dims else "long")
    sys.stdout.write(f"{out}\n")


def convert(
    data: Path,
    out: str,
    layout: Literal["long", "wide"] = "long",
    time: str | None = None,
    ids: Ids | None = None,
    id_column: str = "unique_id",
    values: list[str] | None = None,
    freq: str | None = None,
) -> None:
    """Turn a file of series into another format.

    Args:
        data: .nc, .zarr, .csv, .parquet or .ts.
        out: .nc, .zarr, .csv, .parquet or .ts.
        layout: Layout of a table that is written.
        time: Column with the times of a table.
        ids: A long table's ids are "variates" of one system or separate "series"; left out, the table is wide.
        id_column: Column with the ids of a long table.
        values: Columns with the values of a table.
        freq: Frequency of the times.

    Raises:
        ValueError: if the file cannot be read or the format cannot hold it; the line says why.

    Example:
      omnissm timeseries convert --data weather.csv --time date --out weather.nc
    """
    _check(out, (*SERIES, ".ts"))
    ds = _read(data, time, ids, id_column, values, freq)
    held = {"target", "observed", "row"}
    if out.endswith(".ts"):
        held |= {"label"} if "label" in ds and ds["label"].dims == ("series",) else set()
    elif layout == "long":
        held |= {"past", "future", "static"}
    lost = sorted(str(name) for name in ds.data_vars if name not in held)
    if lost and Path(out).suffix not in (".nc", ".zarr"):
        sys.stderr.write(f"not in {out}: {', '.join(lost)}; .nc and .zarr hold everything\n")
    if out.endswith(".ts"):
        write_ts(ds, out)
    else:
        write_series(ds, out, layout=layout)
    sys.stdout.write(f"{out}\n")


def _read(
    path: Path,
    time: str | None = None,
    ids: Ids | None = None,
    id_column: str = "unique_id",
    values: list[str] | None = None,
    freq: str | None = None,
) -> xr.Dataset:
    return read_ts(path) if path.suffix == ".ts" else read_file(path, time, ids, id_column, values, freq)


def _flagged(ds: xr.Dataset, label: str | None) -> xr.Dataset:
    """The data with true flags as variable `label`, taken from the variable or variate of that name."""
    if label is None:
        return ds
    if label in ds:
        return ds.assign(label=ds[label])
    if label not in ds["variate"].to_numpy():
        raise ValueError(
            f"no variable or column {label!r} with flags; the columns are {', '.join(ds['variate'].values)}"
        )
    flags = ds["target"].sel(variate=label, drop=True)
    return ds.drop_sel(variate=label).assign(label=flags)


def _check(out: str, suffixes: tuple[str, ...], *, stdout: bool = False) -> None:
    """Refuse a bad name before the work, not after it."""
    if Path(out).suffix not in suffixes and not (stdout and out == "-"):
        raise ValueError(f"out is {out!r}, expected a name ending in {', '.join(suffixes)}{', or -' if stdout else ''}")
