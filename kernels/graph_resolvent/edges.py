"""The edges of a batch of graphs, sorted by target and by source, and the graphs sorted into buckets by size."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..dag_scan.order import DagOrder, dag_order

LARGEST_DENSE = 512
_SMALL = 16


@dataclass(frozen=True)
class Bucket:
    """Graphs that are padded to one size.

    Attributes:
        size: Nodes of the padded graph.
        nodes: Node at each place, (graphs, size); v where there is none.
        edges: The edges of these graphs, (e,).
        graph: Graph within the bucket of each of them, (e,).
        src: Place of its source, (e,).
        dst: Place of its target, (e,).
    """

    size: int
    nodes: Tensor
    edges: Tensor
    graph: Tensor
    src: Tensor
    dst: Tensor


@dataclass(frozen=True)
class GraphEdges:
    """What `graph_resolvent` needs to know of a batch of graphs; made once by `graph_edges` and shared by all layers.

    Attributes:
        num_nodes: Nodes v of all graphs.
        ptr: First node of each graph and v, (graphs + 1,), on the CPU.
        src: Source of each edge, (e,), edges sorted by (target, source).
        dst: Its target, (e,).
        edge_perm: Sorted edge -> edge, (e,).
        row_ptr: First sorted edge into each node and e, (v + 1,).
        out_perm: Sorted edges in the order of (source, target), (e,).
        out_row_ptr: First of these that leaves each node and e, (v + 1,).
        buckets: The graphs by size; None if none has a cycle, since dense forms are then for who asks for them.
        order: Their topological order if no graph has a cycle, else None.
    """

    num_nodes: int
    ptr: Tensor
    src: Tensor
    dst: Tensor
    edge_perm: Tensor
    row_ptr: Tensor
    out_perm: Tensor
    out_row_ptr: Tensor
    buckets: tuple[Bucket, ...] | None
    order: DagOrder | None

    @property
    def num_edges(self) -> int:
        """Edges e, parallel ones counted."""
        return self.edge_perm.numel()

    @property
    def largest(self) -> int:
        """Nodes of the largest graph."""
        return int(self.ptr.diff().max()) if len(self.ptr) > 1 else 0

    def in_buckets(self) -> tuple[Bucket, ...]:
        """The graphs by size, sorted now if they were not before."""
        if self.buckets is not None:
            return self.buckets
        index = torch.empty(2, self.num_edges, dtype=torch.long, device="cpu")
        index[:, self.edge_perm.cpu()] = torch.stack([self.src, self.dst]).cpu()
        return tuple(_on(bucket, self.src.device) for bucket in _buckets(index, self.ptr))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> GraphEdges:
        """The same edges on another device; `ptr` stays on the CPU."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if field.name != "ptr" and isinstance(value := getattr(self, field.name), Tensor)
        }
        buckets = self.buckets and tuple(_on(bucket, device, non_blocking=non_blocking) for bucket in self.buckets)
        order = None if self.order is None else self.order.to(device, non_blocking=non_blocking)
        return replace(self, **moved, buckets=buckets, order=order)


def graph_edges(edge_index: Tensor, num_nodes: int, *, ptr: Tensor | None = None) -> GraphEdges:
    """Sort the edges of a batch of graphs.

    Args:
        edge_index: Source and target of each edge, (2, e) integers; parallel edges add up, self loops are allowed.
        num_nodes: Nodes v.
        ptr: First node of each graph and v, (graphs + 1,); None: all nodes are one graph.

    Returns:
        The edges, on the device of `edge_index`; worked out on the CPU.

    Raises:
        TypeError: if `edge_index` is no integer tensor.
        ValueError: if a shape is wrong, an id out of range, or an edge joins two graphs.
    """
    if not isinstance(edge_index, Tensor) or edge_index.is_floating_point() or edge_index.dtype == torch.bool:
        got = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise TypeError(f"`edge_index` must be an integer tensor of shape (2, e), got {got}.")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"`edge_index` must have shape (2, e), got {tuple(edge_index.shape)}.")
    device = edge_index.device
    index = edge_index.detach().cpu().long()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < num_nodes:
        wrong = int(index.min()) if int(index.min()) < 0 else int(index.max())
        raise ValueError(f"`edge_index` names node {wrong}, expected ids from 0 to {num_nodes - 1}.")
    ptr = torch.tensor([0, num_nodes], device="cpu") if ptr is None else ptr.detach().cpu().long()
    if ptr.dim() != 1 or len(ptr) < 1 or ptr[0] != 0 or ptr[-1] != num_nodes or bool((ptr.diff() < 0).any()):
        raise ValueError(f"`ptr` must rise from 0 to {num_nodes}, the number of nodes; got {ptr.tolist()}.")
    graph = torch.repeat_interleave(torch.arange(len(ptr) - 1, device="cpu"), ptr.diff())
    source, target = index
    between = (graph[source] != graph[target]).nonzero()
    if between.numel():
        edge = int(between[0, 0])
        raise ValueError(
            f"Edge {edge} joins nodes {int(source[edge])} and {int(target[edge])} of two graphs; the graphs of a batch "
            "must be separate."
        )
    edge_perm = torch.argsort(target * max(num_nodes, 1) + source, stable=True)
    src, dst = source[edge_perm], target[edge_perm]
    try:
        order = dag_order(index, num_nodes)
    except ValueError:  # ids were checked above: what is left is a self loop or a cycle
        order = None
    places = torch.arange(num_nodes + 1, device="cpu")
    edges = GraphEdges(
        num_nodes=num_nodes,
        ptr=ptr,
        src=src,
        dst=dst,
        edge_perm=edge_perm,
        row_ptr=torch.searchsorted(dst, places),
        out_perm=(out_perm := torch.argsort(src * max(num_nodes, 1) + dst, stable=True)),
        out_row_ptr=torch.searchsorted(src[out_perm], places),
        buckets=_buckets(index, ptr) if order is None else None,
        order=order,
    )
    return edges if device.type == "cpu" else edges.to(device)


def _on(bucket: Bucket, device: torch.device | str, *, non_blocking: bool = False) -> Bucket:
    """The same bucket on another device."""
    names = ("nodes", "edges", "graph", "src", "dst")
    return replace(bucket, **{name: getattr(bucket, name).to(device, non_blocking=non_blocking) for name in names})


def _buckets(index: Tensor, ptr: Tensor) -> tuple[Bucket, ...]:
    """Graphs of similar size together.

    All up to 16 nodes share one size: to solve them one by one takes longer than their padding. Larger ones are padded
    to at most 1.5 times their own, or 32 nodes more; none to more than 512 nodes that has fewer.
    """
    sizes = ptr.diff()
    graph = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes)
    groups: list[list[int]] = []
    for number in torch.argsort(sizes, descending=True, stable=True).tolist():
        size = int(sizes[number])
        if size == 0:
            break
        first = int(sizes[groups[-1][0]]) if groups else 0
        if groups and first <= max(_SMALL, min(1.5 * size, size + 32)) and not size <= LARGEST_DENSE < first:
            groups[-1].append(number)
        else:
            groups.append([number])
    graph_of_edge, local = graph[index[0]], index - ptr[graph[index[0]]]
    buckets = []
    for members in groups:
        size = int(sizes[members[0]])
        rows, offsets = ptr.new_tensor(members), torch.arange(size, device="cpu")
        nodes = ptr[rows, None] + offsets
        nodes[offsets >= sizes[rows, None]] = int(ptr[-1])
        place = torch.full_like(sizes, -1)
        place[rows] = torch.arange(len(members), device="cpu")
        edges = (place[graph_of_edge] >= 0).nonzero()[:, 0]
        buckets.append(
            Bucket(size, nodes, edges, place[graph_of_edge[edges]], local[0, edges].clone(), local[1, edges].clone())
        )
    return tuple(buckets)
