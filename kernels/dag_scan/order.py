"""The order in which a DAG is scanned: levels, edges sorted by target and by source, and what kind of graph it is."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["empty", "chains", "out_forest", "in_forest", "dag"]
_LONGEST_SHOWN = 8
_DEEP, _NARROW = 64, 32  # from this level on, levels of so few nodes are walked node by node
_ON_CPU = ("num_nodes", "kind", "level_ptr", "edge_ptr", "out_ptr", "largest")


@dataclass(frozen=True)
class DagOrder:
    """Topological order of a batch of DAGs (their disjoint union), made once by `dag_order` and shared by all layers.

    The level of a node is the length of the longest path that ends in it. Pointers into levels stay on the CPU, so that
    walking the levels needs no synchronisation with a GPU.

    Attributes:
        num_nodes: Nodes v.
        perm: Position -> node, (v,), sorted by (level, node).
        inverse: Node -> position, (v,).
        level_ptr: First position of each level and v, (levels + 1,), on the CPU.
        edge_perm: Scan edge -> edge, (e,), sorted by (target position, source position, edge).
        src: Position of the source of each scan edge, (e,).
        dst: Position of its target, (e,).
        row_ptr: First scan edge into each position and e, (v + 1,).
        edge_ptr: First scan edge into each level and e, (levels + 1,), on the CPU.
        out_perm: Scan edges sorted by (source, target), (e,).
        out_row_ptr: First of these that leaves each position and e, (v + 1,).
        out_dst: Position of the target of each of these, (e,).
        out_edge: The edge that each of these is, (e,).
        out_ptr: First of these that leaves each level and e, (levels + 1,), on the CPU.
        graph_ptr: Where the nodes of each graph of the batch begin in `places`, and v, (graphs + 1,).
        places: Positions sorted by (graph, position), (v,).
        level_starts: `level_ptr` beside the other tensors, for a kernel that goes through all levels.
        largest: Nodes and edges of the largest graph, a number on the CPU.
        kind: "empty" (no edges), "chains" (no node with two edges in or out), "out_forest" (at most one edge into a
            node), "in_forest" (at most one edge out of a node) or "dag".
    """

    num_nodes: int
    perm: Tensor
    inverse: Tensor
    level_ptr: Tensor
    edge_perm: Tensor
    src: Tensor
    dst: Tensor
    row_ptr: Tensor
    edge_ptr: Tensor
    out_perm: Tensor
    out_row_ptr: Tensor
    out_dst: Tensor
    out_edge: Tensor
    out_ptr: Tensor
    graph_ptr: Tensor
    places: Tensor
    level_starts: Tensor
    largest: Tensor
    kind: Kind

    @property
    def num_edges(self) -> int:
        """Edges e, parallel ones counted."""
        return self.edge_perm.numel()

    @property
    def num_levels(self) -> int:
        """Longest path in nodes."""
        return self.level_ptr.numel() - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DagOrder:
        """The same order on another device; the pointers into levels stay on the CPU."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in fields(self)
            if field.name not in _ON_CPU
        }
        return replace(self, **moved)

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which the operators take them; the fields above give their shapes."""
        return [getattr(self, name) for name in _TENSORS]


_TENSORS = tuple(field.name for field in fields(DagOrder) if field.name not in ("num_nodes", "kind"))


def dag_order(edge_index: Tensor, num_nodes: int, *, batch: Tensor | None = None) -> DagOrder:
    """Levels and sorted edges of a DAG.

    Args:
        edge_index: Source and target of each edge, (2, e) integers; parallel edges are allowed.
        num_nodes: Nodes v.
        batch: Graph that each node belongs to, (v,), to refuse edges between graphs and to name the graph of a cycle.

    Returns:
        The order, on the device of `edge_index`. It is worked out on the CPU, in one vector step per level.

    Raises:
        TypeError: if `edge_index` is no integer tensor.
        ValueError: if its shape is wrong, an id is out of range, an edge joins two graphs of the batch, or the graph
            has a self loop or a cycle; the message shows one.
    """
    if not isinstance(edge_index, Tensor) or edge_index.is_floating_point() or edge_index.dtype == torch.bool:
        got = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise TypeError(f"`edge_index` must be an integer tensor of shape (2, e), got {got}.")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"`edge_index` must have shape (2, e), got {tuple(edge_index.shape)}.")
    device = edge_index.device
    source, target = edge_index.detach().cpu().long()
    if source.numel():
        low, high = int(torch.minimum(source, target).min()), int(torch.maximum(source, target).max())
        if low < 0 or high >= num_nodes:
            wrong = low if low < 0 else high
            raise ValueError(f"`edge_index` names node {wrong}, expected ids from 0 to {num_nodes - 1}.")
    _check_edges(source, target, num_nodes, batch)

    level = _levels(source, target, num_nodes, batch)
    perm = torch.argsort(level, stable=True)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(num_nodes, device="cpu")
    level_ptr = _pointer(level, int(level.max()) + 1 if num_nodes else 0)

    src, dst = inverse[source], inverse[target]
    edge_perm = torch.argsort(dst * max(num_nodes, 1) + src, stable=True)
    src, dst = src[edge_perm], dst[edge_perm]
    row_ptr = _pointer(dst, num_nodes)
    out_perm = torch.argsort(src * max(num_nodes, 1) + dst, stable=True)
    out_row_ptr = _pointer(src, num_nodes)
    graph = torch.zeros_like(perm) if batch is None else batch.detach().cpu().long()[perm]
    places = torch.argsort(graph, stable=True)
    graph_ptr = torch.cat([graph.new_zeros(1), graph[places].unique_consecutive(return_counts=True)[1].cumsum(0)])
    work = 1 + row_ptr.diff()[places]
    order = DagOrder(
        num_nodes=num_nodes,
        perm=perm,
        inverse=inverse,
        level_ptr=level_ptr,
        edge_perm=edge_perm,
        src=src,
        dst=dst,
        row_ptr=row_ptr,
        edge_ptr=row_ptr[level_ptr],
        out_perm=out_perm,
        out_row_ptr=out_row_ptr,
        out_dst=dst[out_perm],
        out_edge=edge_perm[out_perm],
        out_ptr=out_row_ptr[level_ptr],
        graph_ptr=graph_ptr,
        places=places,
        level_starts=level_ptr.clone(),
        largest=torch.segment_reduce(work.double(), "sum", offsets=graph_ptr).max().long() if num_nodes else work.sum(),
        kind=_kind(row_ptr, out_row_ptr),
    )
    return order if device.type == "cpu" else order.to(device)


def _pointer(values: Tensor, count: int) -> Tensor:
    """Where each of `count` values begins once `values` is sorted, and the end."""
    counts = torch.bincount(values, minlength=count) if count else values.new_zeros(0)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _kind(row_ptr: Tensor, out_row_ptr: Tensor) -> Kind:
    if row_ptr[-1] == 0:
        return "empty"
    one_in, one_out = int(row_ptr.diff().max()) <= 1, int(out_row_ptr.diff().max()) <= 1
    if one_in and one_out:
        return "chains"
    return "out_forest" if one_in else "in_forest" if one_out else "dag"


def _check_edges(source: Tensor, target: Tensor, num_nodes: int, batch: Tensor | None) -> None:
    loops = (source == target).nonzero()
    if loops.numel():
        node = int(source[loops[0, 0]])
        raise ValueError(f"`edge_index` has a self loop at node {node}; a DAG has none, remove it.")
    if batch is None:
        return
    if batch.shape != (num_nodes,):
        raise ValueError(f"`batch` must have shape ({num_nodes},), one graph per node; got {tuple(batch.shape)}.")
    batch = batch.cpu()
    between = (batch[source] != batch[target]).nonzero()
    if between.numel():
        edge = int(between[0, 0])
        u, v = int(source[edge]), int(target[edge])
        raise ValueError(
            f"Edge {edge} joins node {u} of graph {int(batch[u])} and node {v} of graph {int(batch[v])}; "
            "the graphs of a batch must be separate."
        )


def _levels(source: Tensor, target: Tensor, num_nodes: int, batch: Tensor | None) -> Tensor:
    """Longest path into each node: nodes leave in the round in which their last predecessor has left."""
    by_source = torch.argsort(source, stable=True)
    followers = target[by_source]
    pointer = _pointer(source, num_nodes)
    waiting = torch.bincount(target, minlength=num_nodes)
    level = torch.full((num_nodes,), -1, device="cpu")
    frontier = (waiting == 0).nonzero()[:, 0]
    depth = 0
    while frontier.numel():
        if depth >= _DEEP and frontier.numel() < _NARROW:
            level = _levels_one_by_one(level, frontier, depth, waiting, pointer, followers)
            break
        level[frontier] = depth
        counts = pointer[frontier + 1] - pointer[frontier]
        first = torch.repeat_interleave(pointer[frontier] - counts.cumsum(0) + counts, counts)
        reached = followers[first + torch.arange(first.numel(), device="cpu")]
        waiting.index_add_(0, reached, waiting.new_full((reached.numel(),), -1))
        frontier = reached[waiting[reached] == 0].unique()
        depth += 1
    if bool((level < 0).any()):
        raise ValueError(_describe_cycle(source, target, level, batch))
    return level


def _levels_one_by_one(
    level: Tensor, frontier: Tensor, depth: int, waiting: Tensor, pointer: Tensor, followers: Tensor
) -> Tensor:
    """The rest of `_levels`, node by node, which is faster where levels have few nodes."""
    found, left, begin, after = level.tolist(), waiting.tolist(), pointer.tolist(), followers.tolist()
    nodes = frontier.tolist()
    while nodes:
        reached = []
        for node in nodes:
            found[node] = depth
            for follower in after[begin[node] : begin[node + 1]]:
                left[follower] -= 1
                if left[follower] == 0:
                    reached.append(follower)
        nodes = reached
        depth += 1
    return torch.tensor(found, device="cpu")


def _describe_cycle(source: Tensor, target: Tensor, level: Tensor, batch: Tensor | None) -> str:
    """Walk backwards among the nodes without a level, each of which has such a predecessor, until one comes again."""
    stuck = int((level < 0).sum())
    inside = (level[source] < 0) & (level[target] < 0)
    before = dict(zip(target[inside].tolist(), source[inside].tolist()))
    node = next(iter(before))
    seen: dict[int, int] = {}
    while node not in seen:
        seen[node] = len(seen)
        node = before[node]
    cycle = [v for v, place in seen.items() if place >= seen[node]][::-1]
    shown = cycle[:_LONGEST_SHOWN]
    path = " -> ".join(map(str, shown)) + (" -> ..." if len(cycle) > len(shown) else f" -> {shown[0]}")
    graph = "" if batch is None else f" of graph {int(batch[node])}"
    return (
        f"The graph has a cycle: nodes {path}{graph}; {stuck} nodes lie on or behind cycles. Orient the edges by an "
        "order of the nodes, or use an operator for general graphs."
    )


def chain_order(order: DagOrder) -> tuple[Tensor, Tensor]:
    """The nodes of a graph of chains, chain after chain.

    Args:
        order: Of kind "chains" or "empty".

    Returns:
        The nodes in the order of (chain, position), (v,), and the number of each one's chain, (v,), which does not
        decrease: `seq_idx` of a scan over them.

    Raises:
        ValueError: if a node has two edges in or out.
    """
    if order.kind not in ("chains", "empty"):
        raise ValueError(f"Only chains can be put in one line, this graph is of kind {order.kind!r}.")
    places = torch.arange(order.num_nodes, device=order.perm.device)
    before = places.clone()
    before[order.dst] = order.src
    for _ in range(max(order.num_levels, 1).bit_length()):  # each round doubles the steps towards the first node
        before = before[before]
    line = torch.argsort(before, stable=True)  # places are in the order of levels already
    starts = before[line] != before[line].roll(1)
    starts[:1] = False
    return order.perm[line], starts.cumsum(0).to(torch.int32)
