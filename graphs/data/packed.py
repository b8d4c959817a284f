"""Packed files: many graphs in one .npz of plain arrays, read and written without pickles.

node_ptr, edge_ptr  int32 (graphs + 1,)   graph g owns nodes node_ptr[g]:node_ptr[g + 1], edges likewise
x                   integers or floats (v, f)
edge_index          integers (2, e), numbered within each graph
edge_attr           integers or floats (e, k), may be absent
y                   (graphs, t), or (v,) or (v, t) for nodes; NaN or -1 for unknown
split               uint8 (graphs,): 0 train, 1 validation, 2 test
undirected          bool: every edge is stored once and stands for both directions; a self loop stands for itself
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ssmcore.training.arrays import read_arrays
from ...ssmcore.training.checkpoints import write_atomic
from ..batch import Graph

PARTS = ("train", "val", "test")


# Kinds of numbers, and dimensions, of each array.
_LAYOUT = {
    **dict.fromkeys(("node_ptr", "edge_ptr", "split"), ("iu", (1,))),
    "edge_index": ("iu", (2,)),
    **dict.fromkeys(("x", "edge_attr"), ("iubf", (2,))),
    "y": ("iubf", (1, 2)),
    "undirected": ("iub", (0,)),
}


def read_packed(path: str | Path) -> tuple[list[Graph], list[str]]:
    """Read a packed file.

    Args:
        path: The .npz file.

    Returns:
        The graphs, and the part each belongs to: "train", "val" or "test".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no packed file or its arrays do not fit together; the message names the array.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; expected a packed file of graphs (.npz).")
    arrays = read_arrays(path)
    missing = [name for name in ("node_ptr", "edge_ptr", "x", "edge_index", "y", "split") if name not in arrays]
    if missing:
        raise ValueError(f"{str(path)!r} is no packed file of graphs: it lacks {', '.join(missing)}.")
    for name, (kinds, dims) in _LAYOUT.items():
        array = arrays.get(name)
        if array is not None and (array.dtype.kind not in kinds or array.ndim not in dims):
            what = "integers" if kinds == "iu" else "numbers"
            raise ValueError(
                f"`{name}` of {str(path)!r} has shape {array.shape} of {array.dtype}, expected {what} in {dims[0]}"
                " dimensions."
            )
    if min(len(arrays[name]) for name in ("node_ptr", "edge_ptr")) == 0:
        raise ValueError(f"`node_ptr` or `edge_ptr` of {str(path)!r} is empty; both begin with 0.")
    node_ptr, edge_ptr = arrays["node_ptr"].astype(np.int64), arrays["edge_ptr"].astype(np.int64)
    graphs = len(node_ptr) - 1
    undirected = bool(arrays["undirected"]) if "undirected" in arrays else False
    x, y = _tensor(arrays["x"]), _tensor(arrays["y"])
    edge_attr = _tensor(arrays["edge_attr"]) if "edge_attr" in arrays else None
    edge_index = torch.from_numpy(arrays["edge_index"].astype(np.int64))
    expected: dict[str, tuple[Any, Any]] = {
        "node_ptr": (int(node_ptr[-1]), len(x)),
        "edge_ptr": (int(edge_ptr[-1]), edge_index.shape[-1]),
        "edge_index": (edge_index.shape[0], 2),
        "edge_attr": (edge_index.shape[-1] if edge_attr is None else len(edge_attr), edge_index.shape[-1]),
        "split": (len(arrays["split"]), graphs),
        "y": (len(y) in (graphs, len(x)), True),
    }
    for name, (got, wanted) in expected.items():
        if got != wanted:
            raise ValueError(f"`{name}` of {str(path)!r} does not fit the other arrays: {got}, expected {wanted}.")
    if node_ptr[0] != 0 or edge_ptr[0] != 0:
        raise ValueError(f"`node_ptr` and `edge_ptr` of {str(path)!r} must begin with 0.")
    if len(edge_ptr) != graphs + 1 or (np.diff(node_ptr) < 0).any() or (np.diff(edge_ptr) < 0).any():
        raise ValueError(f"`node_ptr` and `edge_ptr` of {str(path)!r} must both rise in {graphs} steps.")
    if arrays["split"].max(initial=0) >= len(PARTS) or arrays["split"].min(initial=0) < 0:
        raise ValueError(f"`split` of {str(path)!r} must hold 0 (train), 1 (validation) and 2 (test).")
    by_node = len(y) != graphs
    found = []
    for g in range(graphs):
        nodes, edges = slice(*node_ptr[g : g + 2].tolist()), slice(*edge_ptr[g : g + 2].tolist())
        ends, features = edge_index[:, edges], None if edge_attr is None else edge_attr[edges]
        if undirected:
            two = ends[0] != ends[1]
            ends = torch.cat([ends, ends.flip(0)[:, two]], dim=1)
            features = None if features is None else torch.cat([features, features[two]])
        found.append(Graph(x[nodes], ends, features, y[nodes] if by_node else y[g : g + 1], is_directed=not undirected))
    return found, [PARTS[k] for k in arrays["split"]]


def write_packed(path: str | Path, graphs: Sequence[Graph], split: Sequence[str]) -> None:
    """Write graphs as a packed file, whole or not at all.

    Args:
        path: The .npz file.
        graphs: All with the same optional parts; of an undirected one each edge is stored from the lower node.
        split: Part of each graph: "train", "val" or "test".

    Raises:
        ValueError: if there is no graph, parts are unknown or as many as graphs, or a graph has no `y`.
    """
    if not graphs or len(split) != len(graphs) or not set(split) <= set(PARTS):
        raise ValueError(f"expected graphs and as many parts out of {', '.join(PARTS)}.")
    if any(graph.y is None for graph in graphs):
        raise ValueError("every graph of a packed file has a `y`.")
    undirected = not graphs[0].is_directed
    kept = [graph.edge_index[0] <= graph.edge_index[1] if undirected else slice(None) for graph in graphs]
    ends = [graph.edge_index[:, keep] for graph, keep in zip(graphs, kept)]
    arrays: dict[str, Any] = {
        "node_ptr": np.cumsum([0, *(graph.num_nodes for graph in graphs)]).astype(np.int32),
        "edge_ptr": np.cumsum([0, *(part.shape[1] for part in ends)]).astype(np.int32),
        "x": torch.cat([graph.x for graph in graphs]).numpy(),
        "edge_index": torch.cat(ends, dim=1).numpy(),
        "y": torch.cat([graph.y for graph in graphs if graph.y is not None]).numpy(),
        "split": np.array([PARTS.index(part) for part in split], dtype=np.uint8),
        "undirected": np.array(undirected),
    }
    if graphs[0].edge_attr is not None:
        features = [graph.edge_attr[keep] for graph, keep in zip(graphs, kept) if graph.edge_attr is not None]
        arrays["edge_attr"] = torch.cat(features).numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def _tensor(array: np.ndarray) -> Tensor:
    """Integers as int64, which embeddings need, and floats as float32."""
    return torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iub" else np.float32))
