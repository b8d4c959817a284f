"""Model folders, folders of runs and checkpoints, read the same way."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..ssmcore.training.checkpoints import CONFIG, ModelFolder, export_checkpoint, read_model_folder
from ..ssmcore.training.export import best_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["read_run"]

VERBS = {"forecasting": "forecast", "classification": "classify", "imputation": "impute"}


def read_run(path: str | Path, kinds: str | Sequence[str]) -> ModelFolder:
    """The model folder at `path`, or made from the best checkpoint of a run's folder or from a checkpoint.

    Args:
        path: Model folder, folder of a run, or .ckpt file.
        kinds: What it must hold: "forecasting", "classification", "imputation", or several of them.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if it holds another kind of model; the message names the verb for it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {str(path)!r}; give a model folder, a run's folder or a .ckpt file")
    if (path / CONFIG).is_file():
        folder = read_model_folder(path)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = read_model_folder(export_checkpoint(best_checkpoint(path), Path(scratch) / "model"))
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    model = folder.config["model"]
    found = folder.config.get("task", {}).get("kind", "forecasting")
    if not model.startswith("timeseries/") or "data.json" not in folder.files:
        raise ValueError(f"{str(path)!r} holds {model}, expected a timeseries model with data.json")
    if found not in kinds:
        raise ValueError(
            f"{str(path)!r} holds {model}, a model for {found}, not for {' or '.join(kinds)}; use `{VERBS[found]}`"
        )
    return folder
