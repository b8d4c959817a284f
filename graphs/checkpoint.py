"""Trained graph models out of folders and checkpoints."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ssmcore.training.checkpoints import CONFIG, export_checkpoint, load_weights, read_model_folder
from ..ssmcore.training.export import best_checkpoint
from .models import create_model
from .models.ensemble import GraphEnsemble
from .models.graph_model import GraphModel


@dataclass(frozen=True)
class Trained:
    """A trained network with what it must know of its graphs.

    Attributes:
        name: The model's name.
        net: The network, in evaluation mode.
        data: How the data module prepared the graphs: "schema", and the arguments of `prepare`.
    """

    name: str
    net: GraphModel | GraphEnsemble
    data: dict[str, Any]


def load(checkpoint: str | Path) -> Trained:
    """Read a model folder, a run's folder or a .ckpt file.

    Args:
        checkpoint: Where it is; of a run's folder its best checkpoint is read.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no graph model.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"no model at {str(path)!r}; give a model folder, a run's folder or a .ckpt file.")
    if (path / CONFIG).is_file():
        return _read(path)
    with tempfile.TemporaryDirectory() as scratch:
        return _read(export_checkpoint(best_checkpoint(path), Path(scratch) / "model"))


def _read(folder: Path) -> Trained:
    stored = read_model_folder(folder)
    domain, _, name = str(stored.config.get("model", "")).partition("/")
    if domain != "graphs":
        raise ValueError(f"{str(folder)!r} holds {stored.config.get('model')!r}, expected a graph model.")
    net = create_model(name, **stored.config.get("args", {}))
    load_weights(net, stored.state, source=str(folder))
    return Trained(name, net.eval(), json.loads(stored.files.get("data.json", "{}")))
