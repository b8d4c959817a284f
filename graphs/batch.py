"""Graphs and batches of graphs: the disjoint union, with the topology that all layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ssmcore.mixers import GraphTopology, graph_topology
from .hierarchy import affinity_clusters, edge_distances, join_clusters

OPTIONAL = ("edge_attr", "y", "pe", "pairs", "clusters")
NUMBERED = ("pairs", "clusters")  # these hold nodes


@dataclass(frozen=True, eq=False)
class Graph:
    """One graph.

    Attributes:
        x: Features of the nodes, (v, f): int64 categories or float32 values.
        edge_index: Source and target of each edge, (2, e) int64. Undirected graphs have every edge in both directions.
        edge_attr: Features of the edges, (e, k), or None.
        y: What is to be predicted: (1, t) or (1,) for the graph, (v, t) or (v,) for the nodes, (q,) for pairs of nodes.
            Classes are int64 with -1 for unknown, values and labels of yes or no are float32 with NaN for unknown.
        pe: Positional features of the nodes, (v, k) float32, or None.
        pairs: Pairs of nodes that are asked about, (2, q) int64, or None.
        clusters: Clusters of the nodes by round, (v, rounds) int64, see `omnissm.graphs.hierarchy`, or None.
        is_directed: Whether an edge and its reverse are different things.

    Raises:
        TypeError: if a tensor has a wrong dtype.
        ValueError: if shapes disagree or an edge names a node that is not there.
    """

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor | None = None
    y: Tensor | None = None
    pe: Tensor | None = None
    pairs: Tensor | None = None
    clusters: Tensor | None = None
    is_directed: bool = True

    def __post_init__(self) -> None:
        if self.x.dim() != 2:
            raise ValueError(f"`x` must be (nodes, features), got shape {tuple(self.x.shape)}.")
        for name in ("edge_index", "pairs"):
            ends = getattr(self, name)
            if ends is None:
                continue
            if ends.is_floating_point() or ends.dtype == torch.bool:
                raise TypeError(f"`{name}` must hold integers, got {ends.dtype}.")
            if ends.dim() != 2 or len(ends) != 2:
                raise ValueError(f"`{name}` must have shape (2, number), got {tuple(ends.shape)}.")
            if ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) < len(self.x):
                wrong = int(ends.min()) if int(ends.min()) < 0 else int(ends.max())
                raise ValueError(f"`{name}` names node {wrong}, expected ids from 0 to {len(self.x) - 1}.")
        rows = {"edge_attr": self.num_edges, "pe": self.num_nodes, "clusters": self.num_nodes}
        for name, count in rows.items():
            tensor = getattr(self, name)
            if tensor is not None and (tensor.dim() != 2 or len(tensor) != count):
                raise ValueError(f"`{name}` must have shape ({count}, features), got {tuple(tensor.shape)}.")

    @property
    def num_nodes(self) -> int:
        """Nodes v."""
        return len(self.x)

    @property
    def num_edges(self) -> int:
        """Edges e; an undirected edge counts twice."""
        return self.edge_index.shape[1]


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """Disjoint union of graphs; Lightning moves it by `to`.

    Attributes:
        x: Features of the nodes, (v, f).
        edge_index: Source and target of each edge, (2, e) int64, numbered over the batch.
        edge_attr: Features of the edges, (e, k), or None.
        y: The graphs' targets, one after the other, or None.
        pe: Positional features, (v, k), or None.
        pairs: Pairs of nodes that are asked about, (2, q), numbered over the batch, or None.
        clusters: Clusters of the nodes by round, (v, rounds), numbered over the batch, or None.
        batch: Graph of each node, (v,) int64, not decreasing.
        ptr: First node of each graph and v, (graphs + 1,) int64.
        topology: Order and sorted edges for the state-space layers; None: worked out when a layer needs it.
        is_directed: Whether an edge and its reverse are different things.
        num_graphs: Graphs in the batch.
    """

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor | None
    y: Tensor | None
    pe: Tensor | None
    pairs: Tensor | None
    clusters: Tensor | None
    batch: Tensor
    ptr: Tensor
    topology: GraphTopology | None
    is_directed: bool
    num_graphs: int

    @property
    def num_nodes(self) -> int:
        """Nodes v of all graphs."""
        return len(self.x)

    @property
    def edge_batch(self) -> Tensor:
        """Graph of each edge, (e,)."""
        return self.batch[self.edge_index[0]]

    def with_topology(self) -> GraphBatch:
        """The batch with its topology; itself if it has one.

        Raises:
            ValueError: if an edge joins two graphs.
        """
        if self.topology is not None:
            return self
        return replace(self, topology=graph_topology(self.edge_index, self.num_nodes, ptr=self.ptr))

    def with_clusters(self) -> GraphBatch:
        """The batch with the clusters of its nodes, by the distance of their features; itself if it has them."""
        if self.clusters is not None:
            return self
        distance = edge_distances(self.x, self.edge_index)
        return replace(self, clusters=affinity_clusters(self.edge_index, distance, self.batch))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GraphBatch:
        """The same batch on another device."""
        changes: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | GraphTopology)
        }
        return replace(self, **changes)

    def pin_memory(self) -> GraphBatch:
        """The same batch in page-locked memory, from which copies to a GPU need not wait."""
        return _mapped(self, lambda tensor: tensor.pin_memory())

    def graphs(self) -> list[Graph]:
        """The graphs of the batch; targets are divided by nodes, pairs or graphs, whichever their number is."""
        start, end = self.ptr[:-1].tolist(), self.ptr[1:].tolist()
        edge_graph = self.edge_batch
        pair_graph = None if self.pairs is None else self.batch[self.pairs[0]]
        y_graph = self._graph_of_targets(pair_graph)
        found = []
        for number, (first, last) in enumerate(zip(start, end)):
            edges = edge_graph == number
            found.append(
                Graph(
                    self.x[first:last],
                    self.edge_index[:, edges] - first,
                    None if self.edge_attr is None else self.edge_attr[edges],
                    None if self.y is None or y_graph is None else self.y[y_graph == number],
                    None if self.pe is None else self.pe[first:last],
                    None if self.pairs is None else self.pairs[:, pair_graph == number] - first,
                    None if self.clusters is None else self.clusters[first:last] - first,
                    self.is_directed,
                )
            )
        return found

    def _graph_of_targets(self, pair_graph: Tensor | None) -> Tensor | None:
        if self.y is None or pair_graph is not None:
            return pair_graph
        whole = torch.arange(self.num_graphs, device=self.batch.device)
        return whole if len(self.y) == self.num_graphs else self.batch


def collate(graphs: Sequence[Graph], *, topology: bool = True) -> GraphBatch:
    """Join graphs into one batch.

    Args:
        graphs: At least one; all with the same optional parts. Graphs may be empty.
        topology: Work out the topology here, once for all layers (in the loader's processes).

    Returns:
        The batch, on the graphs' device.

    Raises:
        ValueError: if there is no graph, or some graphs have a part that others lack.
    """
    if not graphs:
        raise ValueError("expected at least one graph, got none.")
    parts: dict[str, Tensor | None] = {}
    for name in OPTIONAL:
        given = [getattr(graph, name) for graph in graphs]
        have = [tensor for tensor in given if tensor is not None]
        if have and len(have) < len(given):
            raise ValueError(f"{len(have)} of {len(given)} graphs have `{name}`; all must, or none.")
        parts[name] = torch.cat(have) if have and name not in NUMBERED else None
    if len({graph.is_directed for graph in graphs}) > 1:
        raise ValueError("some graphs are directed and others are not; a batch must be of one kind.")
    sizes = torch.tensor([graph.num_nodes for graph in graphs])
    ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    starts = ptr.tolist()
    x = torch.cat([graph.x for graph in graphs])
    if graphs[0].pairs is not None:
        shifted = [graph.pairs + start for graph, start in zip(graphs, starts) if graph.pairs is not None]
        parts["pairs"] = torch.cat(shifted, dim=1)
    clusters = [graph.clusters for graph in graphs if graph.clusters is not None]
    if clusters:
        parts["clusters"] = join_clusters(clusters, starts)
    batch = GraphBatch(
        x=x,
        edge_index=torch.cat([graph.edge_index.long() + start for graph, start in zip(graphs, starts)], dim=1),
        **parts,
        batch=torch.repeat_interleave(torch.arange(len(graphs)), sizes).to(x.device),
        ptr=ptr.to(x.device),
        topology=None,
        is_directed=graphs[0].is_directed,
        num_graphs=len(graphs),
    )
    return batch.with_topology() if topology else batch


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _mapped(getattr(value, field.name), change) for field in fields(value)})
    return value
