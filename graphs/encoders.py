"""From features to vectors: categories by sums of embeddings, values by a linear map; positions of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Graph


class FeatureEncoder(nn.Module):
    """Features of nodes or edges as vectors.

    Args:
        d_model: Width of the result.
        vocab: Number of categories of each column, for int64 features; None or empty: there are none.
        features: Number of columns, for float features. With neither, every row gets the same learned vector.

    Raises:
        ValueError: if both are given.
    """

    def __init__(self, d_model: int, vocab: Sequence[int] | None = None, features: int = 0) -> None:
        super().__init__()
        if vocab and features:
            raise ValueError(f"features are categories or values, not both; got vocab={vocab} and features={features}.")
        self.d_model, self.columns, self.categorical = d_model, len(vocab) if vocab else features, bool(vocab)
        sizes = torch.tensor(list(vocab or [1]))
        self.register_buffer("limits", sizes, persistent=False)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)
        self.limits: Tensor
        self.starts: Tensor
        if features:
            self.linear = nn.Linear(features, d_model)
        else:
            self.table = nn.Embedding(int(sizes.sum()), d_model)
            nn.init.normal_(self.table.weight, std=len(sizes) ** -0.5)

    def forward(self, x: Tensor | None, rows: int) -> Tensor:
        """(rows, d_model) of features (rows, columns).

        Raises:
            TypeError: if categories are no integers.
            ValueError: if there are too many or too few columns, or a category is unknown.
        """
        if not self.columns:
            return self.table.weight.expand(rows, -1)
        if x is None or x.shape[1] != self.columns:
            got = "none" if x is None else str(x.shape[1])
            raise ValueError(f"the model takes {self.columns} columns of features, got {got}.")
        if not self.categorical:
            return self.linear(x.to(self.linear.weight.dtype))
        if x.is_floating_point():
            raise TypeError(f"the model takes categories as integers, got {x.dtype}.")
        if x.device.type == "cpu" and bool(((x < 0) | (x >= self.limits)).any()):  # on a GPU this would wait for it
            raise ValueError(f"categories must be from 0 to below {self.limits.tolist()} by column; one is not.")
        return self.table(x + self.starts).sum(1)


def random_walk_pe(edge_index: Tensor, num_nodes: int, steps: int = 16) -> Tensor:
    """Probability that a random walk is back at its start after 1 .. `steps` steps, (v, steps) float32.

        P = A D^{-1},   pe[v, k - 1] = (P^k)[v, v]

    Args:
        edge_index: Source and target of each edge, (2, e); a walk follows edges from source to target.
        num_nodes: Nodes v; memory is that of a dense (v, v) matrix.
        steps: Length of the longest walk.

    Source: Dwivedi, Luu, Laurent, Bengio & Bresson (2022), section 3.
    """
    source, target = edge_index
    leaving = torch.bincount(source, minlength=num_nodes).clamp(min=1)
    matrix = torch.zeros(num_nodes, num_nodes)
    matrix.index_put_((target, source), 1 / leaving[source].float(), accumulate=True)
    power, found = matrix, []
    for _ in range(steps):
        found.append(power.diagonal().clone())
        power = matrix @ power
    return torch.stack(found, dim=1) if found else torch.zeros(num_nodes, 0)


def depth_pe(edge_index: Tensor, num_nodes: int, steps: int) -> Tensor:
    """Depth of each node of a DAG, the longest path that ends there, as one of `steps` columns, (v, steps) float32.

    Args:
        edge_index: Source and target of each edge, (2, e).
        num_nodes: Nodes v.
        steps: Columns; deeper nodes are in the last one.

    Raises:
        ValueError: if the graph has a cycle.

    Source: Luo, Thost & Shi (2023), section 3.2, with one column per depth.
    """
    source, target = edge_index
    depth = torch.zeros(num_nodes, dtype=torch.int64)
    for _ in range(num_nodes):
        before = depth
        depth = before.scatter_reduce(0, target, before[source] + 1, "amax")
        if torch.equal(depth, before):
            return torch.nn.functional.one_hot(depth.clamp(max=steps - 1), steps).float()
    if num_nodes:
        raise ValueError(
            f"depth_steps={steps} needs graphs without cycles, and one of {num_nodes} nodes has a cycle; choose an"
            " orientation, or depth_steps=0."
        )
    return torch.zeros(0, steps)


def sibling_pe(edge_index: Tensor, num_nodes: int, steps: int) -> Tensor:
    """Place of each node among the children of its parent as one of `steps` columns, (v, steps) float32.

    Children are in the order of their numbers, from both ends: the first half of the columns counts the brothers before
    a node, the second half those after it. Roots have zeros.

    Args:
        edge_index: Source (parent) and target (child) of each edge, (2, e); of several parents the highest counts.
        num_nodes: Nodes v.
        steps: Columns, an even number; farther places are in the last column of each half.

    Raises:
        ValueError: if `steps` is not positive and even.
    """
    if steps < 1 or steps % 2:
        raise ValueError(f"the columns for places among siblings must be a positive, even number, got {steps}.")
    source, target = edge_index
    parent = torch.full((num_nodes,), -1, dtype=torch.int64).scatter_reduce(0, target, source, "amax")
    line = torch.argsort(parent, stable=True)
    count = torch.bincount(parent + 1, minlength=num_nodes + 1)
    before = torch.empty_like(parent)
    before[line] = torch.arange(num_nodes) - (count.cumsum(0) - count)[parent[line] + 1]
    after = count[parent + 1] - 1 - before
    half = steps // 2
    found = [torch.nn.functional.one_hot(place.clamp(max=half - 1), half) for place in (before, after)]
    return torch.cat(found, dim=1).float() * (parent >= 0)[:, None]


def feature_schema(graphs: Sequence[Graph]) -> dict[str, Any]:
    """Kinds of features of graphs, as the arguments of a model: categories or columns of nodes, edges, positions.

    Args:
        graphs: All that there are: categories are counted up to the largest found.
    """
    node_vocab, node_features = _columns([graph.x for graph in graphs])
    edges = [graph.edge_attr for graph in graphs if graph.edge_attr is not None]
    edge_vocab, edge_features = _columns(edges) if edges else (None, 0)
    pe = graphs[0].pe
    return {
        "node_vocab": node_vocab,
        "node_features": node_features,
        "edge_vocab": edge_vocab,
        "edge_features": edge_features,
        "pe": 0 if pe is None else pe.shape[1],
    }


def _columns(tensors: Sequence[Tensor]) -> tuple[list[int] | None, int]:
    """Categories of each column, or the number of columns with values."""
    if tensors[0].is_floating_point():
        return None, tensors[0].shape[1]
    tops = [tensor.amax(0) for tensor in tensors if len(tensor)]
    return ((torch.stack(tops).amax(0) + 1).tolist() if tops else [1] * tensors[0].shape[1]), 0
