"""Orders of nodes, and with them acyclic orientations of undirected graphs: each edge goes from low rank to high.

The oriented graph keeps every edge and has no cycle, whatever the order; scanned in both directions it covers the
undirected graph.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .batch import Graph

Orientation = Literal["input", "bfs", "degree", "random"]


def rank_nodes(edge_index: Tensor, num_nodes: int, by: Orientation = "input", *, seed: int = 0) -> Tensor:
    """A rank for every node, (v,): a permutation of 0 .. v - 1.

    Args:
        edge_index: Source and target of each edge, (2, e); directions do not matter.
        num_nodes: Nodes v.
        by: "input": the order of the nodes; "bfs": breadth first from the lowest node of each component; "degree":
            from the most edges to the fewest, ties by node; "random".
        seed: Of "random".

    Raises:
        ValueError: if `by` is unknown.
    """
    if by not in get_args(Orientation):
        raise ValueError(f"by must be one of {', '.join(get_args(Orientation))}, got {by!r}.")
    if by == "input":
        return torch.arange(num_nodes)
    if by == "random":
        return torch.randperm(num_nodes, generator=torch.Generator().manual_seed(seed))
    if by == "degree":
        degree = torch.bincount(edge_index.flatten().cpu(), minlength=num_nodes)
        order = torch.argsort(-degree, stable=True)
    else:
        order = torch.tensor(_breadth_first(edge_index, num_nodes), dtype=torch.int64)
    rank = torch.empty(num_nodes, dtype=torch.int64)
    rank[order] = torch.arange(num_nodes)
    return rank


def orient(graph: Graph, by: Orientation | Tensor = "input", *, seed: int = 0) -> Graph:
    """Turn an undirected graph into a directed one without cycles.

    Args:
        graph: With every edge in both directions, as undirected graphs have; of the two the one from low rank to high
            stays, with its features. Self loops go.
        by: Order of the nodes, see `rank_nodes`, or a rank for each, (v,), without ties.
        seed: Of the order "random".

    Returns:
        The oriented graph; node numbers stay.

    Raises:
        ValueError: if the graph is directed, or ranks are not as many as nodes or not different.
    """
    if graph.is_directed:
        raise ValueError("only undirected graphs are oriented; this one is directed.")
    rank = rank_nodes(graph.edge_index, graph.num_nodes, by, seed=seed) if isinstance(by, str) else by
    if rank.shape != (graph.num_nodes,) or len(rank.unique()) < len(rank):
        raise ValueError(f"ranks must be {graph.num_nodes} different numbers, one per node.")
    rank = rank.to(graph.x.device)
    keep = rank[graph.edge_index[0]] < rank[graph.edge_index[1]]
    edge_attr = None if graph.edge_attr is None else graph.edge_attr[keep]
    return replace(graph, edge_index=graph.edge_index[:, keep], edge_attr=edge_attr, is_directed=True)


def _breadth_first(edge_index: Tensor, num_nodes: int) -> list[int]:
    neighbours: list[list[int]] = [[] for _ in range(num_nodes)]
    for source, target in edge_index.t().tolist():
        neighbours[source].append(target)
        neighbours[target].append(source)
    seen, order = [False] * num_nodes, []
    for start in range(num_nodes):
        if seen[start]:
            continue
        seen[start] = True
        queue = deque([start])
        while queue:
            node = queue.popleft()
            order.append(node)
            for other in sorted(set(neighbours[node])):
                if not seen[other]:
                    seen[other] = True
                    queue.append(other)
    return order
