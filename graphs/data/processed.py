"""Files that PyTorch Geometric writes when it has prepared a data set, read without PyG and without running code.

Such a file is (parts, slices, class[, ...]): all graphs' tensors one after the other, and where each graph begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch import Graph
from ..pyg import from_pyg

_CLASS = "torch_geometric.data.data.Data"


class _Data:
    """Stands for PyG's class of that name: it is named in the file, and nothing of it is needed."""


class _Attributes:
    """One graph's tensors as attributes."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.__dict__ |= parts


def read_processed(path: str | Path) -> list[Graph]:
    """Read the graphs of a file that PyG's `InMemoryDataset.save` has written.

    An undirected graph is one whose edges all have their reverse.

    Raises:
        FileNotFoundError: if there is no such file; PyG makes it when its data set is created once.
        ValueError: if it is damaged, or was written by a PyG older than 2.4.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} does not exist. Create the data set once with PyTorch Geometric, which prepares such files."
        )
    allowed: Any = [(_Data, _CLASS)]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
        parts, slices = content[0], content[1]
        if not isinstance(parts, dict) or not isinstance(slices, dict):
            raise TypeError(f"holds {type(parts).__name__} and {type(slices).__name__}")
        count = min(len(rows) for rows in slices.values()) - 1
        return [_graph({name: _cut(parts[name], name, slices[name], g) for name in slices}) for g in range(count)]
    except PermissionError:
        raise
    except Exception as error:  # of a damaged file anything may be missing, and torch raises many kinds of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{str(path)!r} is no file of graphs as PyG 2.4 or later writes it: {reason}."
            " Prepare the data set again with a new PyG, or write a packed file."
        ) from error


def _cut(tensor: Any, name: str, rows: Tensor, g: int) -> Any:
    start, end = int(rows[g]), int(rows[g + 1])
    if not isinstance(tensor, Tensor):
        return tensor[start:end]
    return tensor[..., start:end] if "index" in name else tensor[start:end]


def _graph(parts: dict[str, Any]) -> Graph:
    source, target = parts["edge_index"]
    forward, backward = (a * (int(parts["edge_index"].max()) + 1 if a.numel() else 1) + b for a, b in
                         ((source, target), (target, source)))  # fmt: skip
    directed = not torch.equal(forward.sort().values, backward.sort().values)
    attributes = _Attributes(parts)
    attributes.is_directed = lambda: directed  # type: ignore[attr-defined]
    return from_pyg(attributes)
