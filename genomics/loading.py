"""Models from files: a model folder, a run's folder or a checkpoint, as a `Scorer`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..ssmcore.training.checkpoints import CONFIG, export_checkpoint
from ..ssmcore.training.devices import find_device
from ..ssmcore.training.export import best_checkpoint
from .likelihood import Scorer
from .models import HUB, from_pretrained, pretrained_models
from .models.official import cast_weights

Dtype = Literal["float32", "bfloat16"]


def load_model(path: str | Path) -> nn.Module:
    """A model from a model folder, a run's folder, a `.ckpt` file, the package, or a repository of the hub.

    Of a run's folder, `model/` is read unless the run's best checkpoint is newer.

    Raises:
        FileNotFoundError: if there is nothing of the kind.
        ValueError: if a file is damaged or holds another domain's model.
    """
    name, path = str(path), Path(path)
    if name.startswith(HUB) or (not path.exists() and name in pretrained_models()):
        return from_pretrained(name)
    if not path.exists():
        known = ", ".join(pretrained_models())
        expected = f"a model folder, a run's folder, a .ckpt file, {HUB}OWNER/NAME, or a model of the package: {known}"
        raise FileNotFoundError(f"No model at {str(path)!r}; expected {expected}.")
    config = path / "model" / CONFIG
    if path.is_dir() and (path / CONFIG).is_file():
        return from_pretrained(path)
    if config.is_file() and not _is_newer(path, config):
        return from_pretrained(config.parent)
    with tempfile.TemporaryDirectory() as scratch:
        return from_pretrained(export_checkpoint(best_checkpoint(path), Path(scratch) / "model"))


def _is_newer(run: Path, config: Path) -> bool:
    """Whether a run holds a checkpoint that is newer than its model folder."""
    try:
        return best_checkpoint(run).stat().st_mtime_ns > config.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def load_scorer(
    model: str | Path | nn.Module | Scorer,
    *,
    device: str = "auto",
    dtype: Dtype = "float32",
    restrict: Literal["acgt"] | None = None,
    batch_tokens: int | None = None,
) -> Scorer:
    """A model ready to score.

    Args:
        model: Model folder, run's folder, `.ckpt` file, a network, or a scorer, which is returned as it is.
        device: "auto" takes the first GPU if there is one; else such as "cpu" or "cuda:1".
        dtype: "float32" or "bfloat16".
        restrict: "acgt" renormalises over the four bases.
        batch_tokens: Most positions of a batch; None: 65,536 on a CPU, 1,048,576 on a GPU.

    Raises:
        ValueError: for a device that is not there.
    """
    if isinstance(model, Scorer):
        return model
    name = ""
    if isinstance(model, (str, Path)):
        name, model = Path(model).resolve().name, load_model(model)
    if dtype == "bfloat16":
        model = cast_weights(model, torch.bfloat16)  # the recurrence stays in float32
    return Scorer(
        model,
        device=find_device(device),
        restrict=restrict,
        batch_tokens=batch_tokens,
        name=name,
    )
