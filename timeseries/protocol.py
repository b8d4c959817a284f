"""A grid of models, data sets, horizons and seeds: every cell trained and tested once, one table at the end.

Each finished cell is a file of its own in OUT/cells, written whole: an interrupted run goes on where it stopped. A
cell's file says by what settings it was made; one of other settings is made anew.

Settings of a cell, the later ones first: the fitting `cases` of its model, the model's own, `training` of the grid, the
defaults here.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..ssmcore.training.checkpoints import sweep, write_atomic
from ..ssmcore.training.interrupts import interruptible
from .tables import print_table, to_markdown, write_table

__all__ = ["protocol", "protocol_table", "run_cell", "run_protocol"]

TRAINING: dict[str, Any] = {
    "lookback": 96,
    "max_epochs": 10,
    "early_stopping": 3,
    "batch_size": 32,
    "lr": 1e-3,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "loss": "mse",
    "ema": None,
    "model_args": {},
    "max_steps": -1,
}
PARTS = ("test", "val")
PLACES = ("data", "horizons")
KEYS = ("models", "data", "horizons", "seeds", "training", "published", "parts")


def protocol(
    grid: Path,
    out: Path = Path("protocol"),
    table_only: bool = False,
    jobs: int = 1,
    root: Path | None = None,
    accelerator: str = "auto",
) -> None:
    """Train and test a grid of models, data sets, horizons and seeds, and write one table.

    Args:
        grid: YAML file with `models` (name to settings), `data` (name to class_path and init_args), `horizons`, `seeds`
            and, if wanted, `training` (settings of all models), `published` (model, data set, horizon to mse, mae) and
            `parts` ([val] leaves the test part alone, for choosing settings). A model's `data` and `horizons` restrict
            it to these; its `cases` are a list of settings, each for the `data` and `horizons` that it names.
        out: Folder for the cells and the tables results.csv, results.md and results.json. Cells that are there are not
            made again.
        table_only: Only write the tables of the cells that are there.
        jobs: Cells made at once, each in a process with one thread; models in the order of the grid, so name the
            slowest first.
        root: Folder of the data, in place of the `root` of every data set.
        accelerator: "auto", "cpu" or "gpu".

    Raises:
        ValueError: if the grid cannot be read; the line says why.

    Example:
      omnissm timeseries protocol --grid etth.yaml --out protocol --root data/ett --jobs 8
    """
    try:
        config = yaml.safe_load(grid.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{str(grid)!r} is no YAML: {' '.join(str(error).split())}") from error
    if table_only:
        checked = check_grid(config)
        if not (out / "cells").is_dir():
            raise ValueError(f"{str(out)!r} holds no cells; leave out --table_only, or name the folder of a run")
        table = protocol_table(checked, out)
    else:
        with interruptible(f"Finished cells are kept in {out / 'cells'}; the same command goes on."):
            table = run_protocol(config, out, jobs=jobs, root=root, accelerator=accelerator)
    print_table(table, str(out / "results.md"))


def check_grid(config: Any) -> dict[str, Any]:
    """The grid, with all names known.

    Raises:
        ValueError: naming what is missing or unknown.
    """
    from .models import MODELS, create_model

    if not isinstance(config, dict):
        raise ValueError("a grid is a mapping with models, data, horizons and seeds")
    for name in ("models", "data", "horizons", "seeds"):
        if not config.get(name):
            raise ValueError(f"the grid has no {name}; it needs models, data, horizons and seeds")
    if unknown := set(config) - set(KEYS):
        raise ValueError(f"the grid has unknown keys {', '.join(sorted(unknown))}; known: {', '.join(sorted(KEYS))}")
    for name in ("models", "data"):
        _check_kind(f"{name} of the grid", config[name], dict)
    _check_numbers("horizons", config["horizons"], least=1)
    _check_numbers("seeds", config["seeds"], least=0)
    _check_kind("parts of the grid", config.get("parts") or [], list)
    if unknown := set(config.get("parts") or ()) - set(PARTS):
        raise ValueError(f"the grid has an unknown part {min(unknown)!r}; expected some of {', '.join(PARTS)}")
    _check_settings("training of the grid", config.get("training") or {})
    for label, settings in config["models"].items():
        settings = {} if settings is None else settings
        _check_kind(f"model {label} of the grid", settings, dict)
        if (name := settings.get("model", label)) not in MODELS:
            create_model(name)  # answers with close names
        _check_kind(f"the cases of {label}", settings.get("cases", []), list)
        for case in (settings, *settings.get("cases", ())):
            _check_settings(f"a case of {label}", case, ("model", "cases", *PLACES))
            for key in PLACES:
                _check_kind(f"the {key} of {label}", case.get(key, []), list)
                if unknown := set(case.get(key, ())) - set(config[key]):
                    raise ValueError(f"{label} names the {key} {min(unknown)!r}, which the grid does not have")
    for label, source in config["data"].items():
        _check_source(label, source, config["horizons"][0])
    _check_published(config.get("published") or {})
    return config


def _check_kind(what: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        expected = "a list" if kind is list else "a mapping from name to settings"
        raise ValueError(f"{what} must be {expected}, got {value!r}")


def _check_numbers(name: str, values: Any, least: int) -> None:
    if (
        not isinstance(values, (list, tuple))
        or any(type(each) is not int or each < least for each in values)
        or len(set(values)) < len(values)
    ):
        raise ValueError(
            f"{name} of the grid must be a list of different whole numbers from {least} on, got {values!r}"
        )


def _check_settings(what: str, settings: Any, others: Sequence[str] = ()) -> None:
    from .fitting import SCHEDULES

    _check_kind(what, settings, dict)
    if unknown := set(settings) - {*TRAINING, *others}:
        raise ValueError(f"unknown setting {min(unknown)!r}; known: {', '.join(TRAINING)}")
    if (schedule := settings.get("schedule", "cosine")) not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r} in {what}; expected one of {', '.join(SCHEDULES)}")
    _check_kind(f"model_args in {what}", settings.get("model_args", {}), dict)


def _check_source(label: str, source: Any, horizon: int) -> None:
    """Refuse a data module that is none or has no such options; nothing is read."""
    _check_kind(f"data {label} of the grid", source, dict)
    path, options = str(source.get("class_path", "")), source.get("init_args") or {}
    from ..ssmcore.training.data import data_class

    try:
        found = data_class(path)
    except ValueError as error:
        raise ValueError(f"data {label} of the grid has the {error}") from None
    try:
        found(**options, lookback=TRAINING["lookback"], horizon=horizon)
    except TypeError as error:
        raise ValueError(f"data {label} of the grid: {error}") from None


def _check_published(published: Any) -> None:
    _check_kind("published of the grid", published, dict)
    for model, sets in published.items():
        _check_kind(f"published {model}", sets, dict)
        for data, horizons in sets.items():
            _check_kind(f"published {model} on {data}", horizons, dict)
            for horizon, errors in horizons.items():
                if not isinstance(errors, (list, tuple)) or len(errors) != 2:
                    raise ValueError(f"published {model} on {data}, {horizon}: expected [mse, mae], got {errors!r}")


def cells(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings of all cells, in the order of the table."""
    found = []
    grid = itertools.product(config["data"].items(), config["horizons"], config["models"].items(), config["seeds"])
    for (data, source), horizon, (label, own), seed in grid:
        fitting = [
            case
            for case in (own or {}, *(own or {}).get("cases", ()))
            if data in case.get("data", [data]) and horizon in case.get("horizons", [horizon])
        ]
        if (own or {}) not in fitting:
            continue
        layers = [TRAINING, config.get("training") or {}, *fitting]
        settings: dict[str, Any] = {}
        for layer in layers:
            arguments = {**settings.get("model_args", {}), **layer.get("model_args", {})}
            settings = {**settings, **layer, "model_args": arguments}
        settings = {key: value for key, value in settings.items() if key not in ("cases", *PLACES)}
        place = {"label": label, "data": data, "horizon": int(horizon), "seed": int(seed)}
        parts = list(config.get("parts") or PARTS)
        found.append({**settings, "model": settings.get("model", label), "source": source, "parts": parts, **place})
    return found


def run_protocol(
    config: Mapping[str, Any],
    out: str | Path,
    *,
    jobs: int = 1,
    root: str | Path | None = None,
    accelerator: str = "auto",
    progress: bool = True,
) -> pd.DataFrame:
    """Make the cells that are missing, and the table.

    Args:
        config: The grid, see `protocol`.
        out: Folder.
        jobs: Cells made at once, each in a process of one thread.
        root: Folder of the data, in place of the `root` of every data set.
        accelerator: "auto", "cpu" or "gpu".
        progress: Say on stderr which cell is made.

    Returns:
        The table, see `protocol_table`.

    Raises:
        ValueError: if `jobs` is below 1.
        ChildProcessError: if a process that makes cells was killed.
        NonFiniteError: naming the cell whose loss or gradient is not finite, with one job.
        RuntimeError: at the end, if a cell failed with several jobs; the others are made.
    """
    if jobs < 1:
        raise ValueError(f"expected jobs of at least 1, got {jobs}")
    wanted = cells(check_grid(config))
    folder = Path(out) / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder.parent):
        sweep(place)
    missing = [cell for cell in wanted if _read(_path(folder, cell), cell) is None]
    missing.sort(key=lambda cell: (list(config["models"]).index(cell["label"]), -cell["horizon"]))
    made = _made(missing, functools.partial(_runnable, root=root, accelerator=accelerator), jobs)
    failed = []
    for number, (cell, result) in enumerate(made, start=1):
        path = _path(folder, cell)
        if isinstance(result, BrokenProcessPool):
            raise ChildProcessError(
                "A process that makes cells has ended. Often memory has run out: try fewer --jobs."
                f" Finished cells are kept in {str(folder)!r}; the same command goes on."
            )
        if isinstance(result, Exception):
            failed.append(f"{path.stem}: {result}")
        else:
            found = {"omnissm": version("omnissm"), "settings": cell, **result}
            write_atomic(path, json.dumps(found, indent=1) + "\n")
            protocol_table(config, out)  # whoever looks in between sees what is done
        if progress:
            sys.stderr.write(f"{number}/{len(missing)} {path.stem}\n")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(missing)} cells failed; {'; '.join(failed)}")
    return protocol_table(config, out)


def _runnable(cell: Mapping[str, Any], root: str | Path | None, accelerator: str) -> dict[str, Any]:
    """Settings of a cell with what this machine adds, which is no part of a result."""
    source = cell["source"]
    if root is not None and "root" in source.get("init_args", {}):
        source = {**source, "init_args": {**source["init_args"], "root": str(root)}}
    return {**cell, "source": source, "accelerator": accelerator}


def _made(
    missing: Sequence[dict[str, Any]], runnable: Callable[[dict[str, Any]], dict[str, Any]], jobs: int
) -> Iterator[tuple[dict[str, Any], dict[str, float] | Exception]]:
    """Cells with their results as they come."""
    if jobs == 1:
        from ..ssmcore.training import NonFiniteError

        for cell in missing:
            try:
                yield cell, run_cell(runnable(cell))
            except NonFiniteError as error:
                raise NonFiniteError(f"{cell['label']} on {cell['data']}, {cell['horizon']}: {error}") from error
        return
    context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
    with ProcessPoolExecutor(min(jobs, len(missing) or 1), context, _one_thread) as pool:
        futures = {pool.submit(run_cell, runnable(cell)): cell for cell in missing}
        try:
            for future in as_completed(futures):
                failure = future.exception()
                yield futures[future], failure if isinstance(failure, Exception) else future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # else they finish their cells, for nobody
                process.terminate()
            raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def run_cell(cell: Mapping[str, Any]) -> dict[str, float]:
    """Train one model and test it on every test window, in scaled units.

    Args:
        cell: Settings, see `cells`, and `accelerator`.

    Returns:
        mse and mae of the test part, val_mse and val_mae, each where the cell's `parts` have it; epochs, parameters,
        seconds.
    """
    import torch

    from ..ssmcore.training import SSMTask
    from ..ssmcore.training.data import data_class
    from .fitting import SCHEDULES, train
    from .metrics import ErrorSums
    from .tasks import Forecasting

    began = time.perf_counter()
    options = {**cell["source"].get("init_args", {}), "lookback": cell["lookback"], "horizon": cell["horizon"]}
    data: Any = data_class(cell["source"]["class_path"])(**options, batch_size=cell["batch_size"], eval_batch_size=256)
    data.run_seed = cell["seed"]
    data.setup()
    with torch.random.fork_rng():
        torch.manual_seed(cell["seed"])
        task: SSMTask = Forecasting(
            cell["model"],
            dict(cell["model_args"]),
            cell["lookback"],
            cell["horizon"],
            data.n_variates,
            data.covariates,
            loss=cell["loss"],
            optimizer=functools.partial(torch.optim.AdamW, lr=cell["lr"], weight_decay=cell["weight_decay"]),
            lr_scheduler=SCHEDULES[cell["schedule"]],
            coverages=(),
        )
        rows: list[dict[str, float]] = []
        solve = getattr(task.net, "fit_windows", None)
        if callable(solve):
            solve(data.windows("train"))
        elif any(p.requires_grad for p in task.net.parameters()):
            rows = train(
                data,
                task,
                max_epochs=cell["max_epochs"],
                early_stopping=cell["early_stopping"],
                ema=cell["ema"],
                validate=True,
                progress=False,
                trainer={"max_steps": cell["max_steps"], "accelerator": cell["accelerator"]},
            )
    net = task.net.cpu().eval()
    found: dict[str, float] = {}
    for part in cell["parts"]:
        errors = ErrorSums()
        with torch.no_grad():
            for batch in data.windows(part).batches(256):
                errors.update(batch.y, net(batch), batch.y_mask)
        found |= {name if part == "test" else f"{part}_{name}": value for name, value in errors.compute().items()}
    return {
        **found,
        "epochs": len(rows),
        "parameters": sum(p.numel() for p in net.parameters()),
        "seconds": round(time.perf_counter() - began, 2),
    }


def protocol_table(config: Mapping[str, Any], out: str | Path) -> pd.DataFrame:
    """Mean and spread over seeds of the cells that are there, written to results.csv and results.md.

    results.md adds the means over horizons, results.json holds every cell.

    Args:
        config: The grid.
        out: Folder.

    Returns:
        A row per data set, horizon and model: `mse`, `mae` of the test part, their standard deviations over seeds (NaN
        of one), `val_mse`, `val_mae`, number of seeds, mean seconds; `published_mse` and `published_mae` where the grid
        has them, also of models that the grid does not train.
    """
    folder = Path(out) / "cells"
    done = [found for cell in cells(config) if (found := _read(_path(folder, cell), cell)) is not None]
    measured = ["mse", "mae", "val_mse", "val_mae", "seconds"]
    place = ["data", "horizon", "model"]
    rows = [
        {**{key: found["settings"][key] for key in ("data", "horizon")}, "model": found["settings"]["label"]}
        | {key: found.get(key, float("nan")) for key in measured}
        for found in done
    ]
    groups = pd.DataFrame(rows, columns=[*place, *measured]).groupby(place, sort=False)
    spread = {f"{name}_std": (name, "std") for name in ("mse", "mae")}
    table = groups.agg(**{name: (name, "mean") for name in measured}, **spread, seeds=("seconds", "size")).reset_index()
    table = table[[*place, "mse", "mse_std", "mae", "mae_std", "val_mse", "val_mae", "seeds", "seconds"]]
    table = _with_published(table, config)
    Path(out).mkdir(parents=True, exist_ok=True)
    write_table(table, str(Path(out) / "results.csv"))
    means = _over_horizons(table, len(config["horizons"]))
    text = to_markdown(table) + (f"\nMeans over the horizons:\n\n{to_markdown(means)}" if len(means) else "")
    write_atomic(Path(out) / "results.md", text)
    write_atomic(Path(out) / "results.json", json.dumps(done, indent=1) + "\n")
    return table


def _with_published(table: pd.DataFrame, config: Mapping[str, Any]) -> pd.DataFrame:
    """The table with published errors, and with rows of the models of which only those are known."""
    rows = [
        {"model": model, "data": data, "horizon": horizon, "published_mse": mse, "published_mae": mae}
        for model, sets in (config.get("published") or {}).items()
        for data, horizons in sets.items()
        for horizon, (mse, mae) in horizons.items()
        if data in config["data"] and horizon in config["horizons"]
    ]
    if not rows:
        return table
    place = ["data", "horizon", "model"]
    own, models = set(config["models"]), [*config["models"], *config["published"]]
    published = pd.DataFrame(rows)
    there = pd.MultiIndex.from_frame(table[place])
    wanted = pd.MultiIndex.from_frame(published[place]).isin(there) | ~published["model"].isin(own)
    table = table.merge(published[wanted], on=place, how="outer")
    orders = {"data": list(config["data"]), "horizon": list(config["horizons"]), "model": models}
    table = table.sort_values(place, key=lambda column: column.map(orders[str(column.name)].index), ignore_index=True)
    return table.assign(seeds=table["seeds"].fillna(0).astype(int))


def _over_horizons(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """Means over horizons of each model and data set that has them all."""
    columns = [name for name in ("mse", "mae", "val_mse", "val_mae", "published_mse", "published_mae") if name in table]
    groups = table.groupby(["data", "model"], sort=False)
    means = groups[columns].sum(min_count=count) / count
    return means[groups.size() == count].dropna(how="all").reset_index()


def _path(folder: Path, cell: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{cell['data']}-{cell['horizon']}-{cell['label']}-{cell['seed']}-{key}.json"
    return folder / name.replace("/", "_")


def _read(path: Path, cell: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finished cell of these settings."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # not made yet, or not one of ours: made anew
        return None
    return found if found.get("settings") == json.loads(json.dumps(cell)) else None
