"""A grid of models, data sets, horizons and seeds: every cell trained and tested once, one table at the end.

Each finished cell is a file of its own in OUT/cells, written whole: an interrupted run goes on where it stopped. A
cell's file says by what settings it was made; one of other settings is made anew.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from .tables import print_table, write_table

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
    "model_args": {},
    "max_steps": -1,
}


def protocol(grid: Path, out: Path = Path("protocol"), table_only: bool = False) -> None:
    """Train and test a grid of models, data sets, horizons and seeds, and write one table.

    Args:
        grid: YAML file with `models` (name to settings), `data` (name to class_path and init_args), `horizons`, `seeds`
            and, if wanted, `training` (settings of all models) and `published` (model, data set, horizon to mse, mae).
        out: Folder for the cells and the tables results.csv and results.md. Cells that are there are not made again.
        table_only: Only write the tables of the cells that are there.

    Raises:
        ValueError: if the grid cannot be read; the line says why.

    Example:
      omnissm timeseries protocol --grid etth.yaml --out protocol
    """
    try:
        config = yaml.safe_load(grid.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{str(grid)!r} is no YAML: {' '.join(str(error).split())}") from error
    table = protocol_table(check_grid(config), out) if table_only else run_protocol(config, out)
    print_table(table, str(out / "results.md"))


def check_grid(config: Any) -> dict[str, Any]:
    """The grid, with all names known.

    Raises:
        ValueError: naming what is missing or unknown.
    """
    from .models import MODELS, create_model

    if not isinstance(config, dict):
        raise ValueError("a grid is a mapping with models, data, horizons and seeds")
    known = {"models", "data", "horizons", "seeds", "training", "published"}
    for name in ("models", "data", "horizons", "seeds"):
        if not config.get(name):
            raise ValueError(f"the grid has no {name}; it needs models, data, horizons and seeds")
    if unknown := set(config) - known:
        raise ValueError(f"the grid has unknown keys {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    for label, settings in config["models"].items():
        if (name := (settings or {}).get("model", label)) not in MODELS:
            create_model(name)  # answers with close names
    for each in (config.get("training") or {}, *(settings or {} for settings in config["models"].values())):
        if unknown := set(each) - set(TRAINING) - {"model"}:
            raise ValueError(f"unknown setting {min(unknown)!r}; known: {', '.join(TRAINING)}")
    return config


def cells(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings of all cells, in the order they are made."""
    found = []
    grid = itertools.product(config["data"].items(), config["horizons"], config["models"].items(), config["seeds"])
    for (data, source), horizon, (label, own), seed in grid:
        settings = {**TRAINING, **(config.get("training") or {}), **(own or {})}
        place = {"label": label, "data": data, "horizon": int(horizon), "seed": int(seed)}
        found.append({**settings, "model": settings.get("model", label), "source": source, **place})
    return found


def run_protocol(config: Mapping[str, Any], out: str | Path, *, progress: bool = True) -> pd.DataFrame:
    """Make the cells that are missing, and the table.

    Args:
        config: The grid, see `protocol`.
        out: Folder.
        progress: Say on stderr which cell is made.

    Returns:
        The table, see `protocol_table`.
    """
    from ..ssmcore.training.checkpoints import write_atomic

    wanted = cells(check_grid(config))
    folder = Path(out) / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(wanted, start=1):
        path = _path(folder, cell)
        if _read(path, cell) is not None:
            continue
        if progress:
            sys.stderr.write(f"{number}/{len(wanted)} {path.stem}\n")
        result = {"omnissm": version("omnissm"), "settings": cell, **run_cell(cell)}
        write_atomic(path, json.dumps(result, indent=1) + "\n")
        protocol_table(config, out)  # whoever looks in between sees what is done
    return protocol_table(config, out)


def run_cell(cell: Mapping[str, Any]) -> dict[str, float]:
    """Train one model and test it on every test window, in scaled units.

    Args:
        cell: Settings, see `cells`.

    Returns:
        mse, mae, val_loss of the best epoch, epochs, parameters and seconds.
    """
    import time

    import torch

    from ..ssmcore.training import SSMTask
    from .fitting import SCHEDULES, train
    from .metrics import ErrorSums
    from .tasks import Forecasting

    began = time.perf_counter()
    module, _, name = cell["source"]["class_path"].rpartition(".")
    options = {**cell["source"].get("init_args", {}), "lookback": cell["lookback"], "horizon": cell["horizon"]}
    data = getattr(import_module(module), name)(**options, batch_size=cell["batch_size"], eval_batch_size=256)
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
                ema=None,
                validate=True,
                progress=False,
                trainer={"max_steps": cell["max_steps"]},
            )
    net, errors = task.net.cpu().eval(), ErrorSums()
    with torch.no_grad():
        for batch in data.windows("test").batches(256):
            errors.update(batch.y, net(batch), batch.y_mask)
    return {
        **errors.compute(),
        "val_loss": min((row.get("val_loss", float("inf")) for row in rows), default=float("nan")),
        "epochs": len(rows),
        "parameters": sum(p.numel() for p in net.parameters()),
        "seconds": round(time.perf_counter() - began, 2),
    }


def protocol_table(config: Mapping[str, Any], out: str | Path) -> pd.DataFrame:
    """Mean and spread over seeds of the cells that are there, written to results.csv and results.md.

    Args:
        config: The grid.
        out: Folder.

    Returns:
        A row per data set, horizon and model: `mse`, `mae`, their standard deviations over seeds (NaN of one), number
        of seeds, mean seconds; `published_mse` and `published_mae` where the grid has them.
    """
    folder = Path(out) / "cells"
    done = [(cell, _read(_path(folder, cell), cell)) for cell in cells(config)]
    rows = [
        {**{key: cell[key] for key in ("data", "horizon", "label")}, **{k: found[k] for k in ("mse", "mae", "seconds")}}
        for cell, found in done
        if found is not None
    ]
    columns = ["data", "horizon", "model", "mse", "mse_std", "mae", "mae_std", "seeds", "seconds"]
    if not rows:
        table = pd.DataFrame(columns=columns)
    else:
        groups = pd.DataFrame(rows).groupby(["data", "horizon", "label"], sort=False)
        table = groups.agg(
            mse=("mse", "mean"),
            mse_std=("mse", "std"),
            mae=("mae", "mean"),
            mae_std=("mae", "std"),
            seeds=("mse", "size"),
            seconds=("seconds", "mean"),
        ).reset_index()
        table = table.rename(columns={"label": "model"})[columns]
    published = config.get("published") or {}
    if published:
        for place, name in enumerate(("published_mse", "published_mae")):
            table[name] = [
                published.get(row.model, {}).get(row.data, {}).get(row.horizon, (None, None))[place]
                for row in table.itertuples()
            ]
            table[name] = table[name].astype(float)
    Path(out).mkdir(parents=True, exist_ok=True)
    for suffix in ("csv", "md"):
        write_table(table, str(Path(out) / f"results.{suffix}"))
    return table


def _path(folder: Path, cell: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{cell['data']}-{cell['horizon']}-{cell['label']}-{cell['seed']}-{key}.json"


def _read(path: Path, cell: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finished cell of these settings."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # not made yet, or not one of ours: made anew
        return None
    return found if found.get("settings") == json.loads(json.dumps(cell)) else None
