"""Data objects of PyTorch Geometric, read and written by the names of their attributes; PyG itself is optional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batch import Graph, GraphBatch, collate


def from_pyg(data: Any) -> Graph:
    """Read one graph.

    Args:
        data: A PyG `Data`, or anything with `x` and `edge_index` and, if there are any, `edge_attr`, `y`, `pe`, and
            `edge_label_index` with `edge_label`.

    Returns:
        The graph; vectors of features become columns.

    Raises:
        TypeError: if `x` or `edge_index` is missing.
    """
    parts = _parts(data)
    directed = bool(data.is_directed()) if callable(getattr(data, "is_directed", None)) else True
    return Graph(**parts, is_directed=directed)


def as_batch(data: Any) -> GraphBatch:
    """What a model can work on: a batch as it is, one graph, or a PyG `Data` or `Batch`.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the graphs of a PyG `Batch` are not one after the other, or an edge joins two.
    """
    if isinstance(data, GraphBatch):
        return data
    if isinstance(data, Graph):
        return collate([data], topology=False)
    numbers = getattr(data, "batch", None)
    if numbers is None:
        return collate([from_pyg(data)], topology=False)
    parts = _parts(data)
    numbers = numbers.long()
    if bool((numbers.diff() < 0).any()):
        raise ValueError("`batch` must not decrease: the nodes of a graph come one after the other.")
    between = (numbers[parts["edge_index"][0]] != numbers[parts["edge_index"][1]]).nonzero()
    if len(between):
        edge = int(between[0])
        u, v = parts["edge_index"][:, edge].tolist()
        raise ValueError(f"Edge {edge} joins nodes {u} and {v} of two graphs; the graphs of a batch must be separate.")
    ptr = getattr(data, "ptr", None)
    if ptr is None:
        ptr = torch.cat([numbers.new_zeros(1), torch.bincount(numbers).cumsum(0)])
    directed = bool(data.is_directed()) if callable(getattr(data, "is_directed", None)) else True
    return GraphBatch(**parts, batch=numbers, ptr=ptr, topology=None, is_directed=directed, num_graphs=len(ptr) - 1)


def to_pyg(graph: Graph) -> Any:
    """Make a PyG `Data`.

    Raises:
        ImportError: if PyG is missing.
    """
    try:
        from torch_geometric.data import Data
    except ImportError as error:
        raise ImportError("`to_pyg` needs PyTorch Geometric: pip install torch_geometric") from error
    parts: dict[str, Any] = {"x": graph.x, "edge_index": graph.edge_index, "num_nodes": graph.num_nodes}
    for name in ("edge_attr", "y", "pe"):
        if getattr(graph, name) is not None:
            parts[name] = getattr(graph, name)
    if graph.pairs is not None:
        parts |= {"edge_label_index": graph.pairs, "edge_label": parts.pop("y", None)}
    return Data(**parts)


def _parts(data: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("x", "edge_index"):
        tensor = getattr(data, name, None)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected a graph with tensors `x` and `edge_index`, got {type(data).__name__} without `{name}`."
            )
        found[name] = tensor
    found["x"] = _columns(found["x"])
    found["edge_index"] = found["edge_index"].long()
    for name in ("edge_attr", "y", "pe"):
        found[name] = getattr(data, name, None)
    if found["edge_attr"] is not None:
        found["edge_attr"] = _columns(found["edge_attr"])
    found["pairs"] = getattr(data, "edge_label_index", None)
    found["clusters"] = None
    if found["pairs"] is not None:
        found["y"] = getattr(data, "edge_label", None)
    return found


def _columns(tensor: Tensor) -> Tensor:
    return tensor[:, None] if tensor.dim() == 1 else tensor
