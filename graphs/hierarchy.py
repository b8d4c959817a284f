"""Hierarchical affinity clustering: rounds of merging every cluster with its closest neighbour, as in Boruvka's trees.

A column of `clusters` per round names the cluster of each node by the smallest node in it; the last column has one
cluster per graph. Read from the last column to the first it is a path from the root of a tree of clusters down to the
node, and sorted by these paths the nodes are the leaves of that tree, depth first.

Source: Bateni, Behnezhad, Derakhshan, Hajiaghayi, Kiveris, Lattanzi & Mirrokni (2017), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def edge_distances(x: Tensor, edge_index: Tensor) -> Tensor:
    """Distance of the features of the two ends of every edge, (e,) float64.

    The number of columns that differ for categories, the Euclidean distance for values.
    """
    first, second = x[edge_index[0]], x[edge_index[1]]
    if x.is_floating_point():
        return (first.double() - second.double()).square().sum(1).sqrt()
    return (first != second).sum(1).double()


def affinity_clusters(edge_index: Tensor, distance: Tensor, batch: Tensor) -> Tensor:
    """Clusters of the nodes of one graph or several after each round, (v, rounds) int64.

    In a round every cluster picks the edge of least distance that leaves it, and clusters joined by picked edges become
    one; ties go to the smaller clusters, named by their smallest nodes. What no edge joins is joined in the last round.
    There are at most log2(v) + 1 rounds, of O(e log e) each. Directions of edges do not matter.

    Args:
        edge_index: Source and target of each edge, (2, e).
        distance: Of its ends, (e,).
        batch: Graph of each node, (v,), not decreasing; zeros for one graph.

    Returns:
        Smallest node of the cluster of each node, by round; a graph that is whole before others repeats its last
        column. There is none if all graphs have at most one node.
    """
    nodes = len(batch)
    own = torch.arange(nodes, device=batch.device)
    label, found = own, []
    while True:
        ends = label[edge_index]
        leaving = ends[0] != ends[1]
        if not bool(leaving.any()):
            break
        low, high = ends[:, leaving].amin(0), ends[:, leaving].amax(0)
        rank = _ranks(distance[leaving], low * nodes + high)
        label = _merged(low, high, rank, nodes)[label]
        found.append(label)
    root = torch.full_like(own, nodes).scatter_reduce(0, batch, own, "amin")[batch]
    if not torch.equal(root, label):
        found.append(root)
    clusters = torch.stack(found, dim=1) if found else own.new_zeros(nodes, 0)
    if not found:
        return clusters
    # A graph may have waited for others before its parts were joined: what merged something comes first.
    real = real_rounds(clusters, batch, int(batch[-1]) + 1)
    real, order = real.sort(dim=1, descending=True, stable=True)
    return torch.where(real, clusters.gather(1, order), root[:, None])[:, real.any(0)]


def _ranks(distance: Tensor, pair: Tensor) -> Tensor:
    """Place of each edge by distance, then by the pair of clusters that it joins."""
    order = torch.argsort(pair, stable=True)
    order = order[torch.argsort(distance[order], stable=True)]
    return torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))


def _merged(low: Tensor, high: Tensor, rank: Tensor, nodes: int) -> Tensor:
    """New name of every cluster, (v,): the smallest of those that the picked edges, of least rank, join it to."""
    name = torch.arange(nodes, device=low.device)
    least = torch.full((nodes,), len(rank), device=low.device)
    least = least.scatter_reduce(0, torch.cat([low, high]), torch.cat([rank, rank]), "amin")
    by_rank = torch.empty_like(rank).index_copy(0, rank, torch.arange(len(rank), device=rank.device))
    picks = least < len(rank)
    edge = by_rank[least[picks]]
    parent = name.clone()
    parent[picks] = low[edge] + high[edge] - name[picks]  # the other end
    # Along picks ranks fall, so the only cycles are two clusters that pick each other: the smaller becomes the root.
    parent = torch.where((parent[parent] == name) & (name < parent), name, parent)
    while not torch.equal(parent, parent[parent]):
        parent = parent[parent]
    return name.clone().scatter_reduce(0, parent, name, "amin")[parent]


def join_clusters(clusters: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """Clusters of several graphs as those of their union; `starts` are the first nodes."""
    rounds = max(one.shape[1] for one in clusters)
    wide = []
    for one, start in zip(clusters, starts):
        # a graph without rounds has at most one node, which is its own cluster
        last = one[:, -1:] if one.shape[1] else one.new_zeros(len(one), 1)
        wide.append(torch.cat([one, last.expand(-1, rounds - one.shape[1])], dim=1) + start)
    return torch.cat(wide)


def leaf_order(clusters: Tensor, batch: Tensor) -> Tensor:
    """Nodes in the depth-first order of their trees, graph by graph, (v,); of two children the one with the smaller
    node comes first."""
    order = torch.arange(len(batch), device=batch.device)
    for column in clusters.unbind(1):
        order = order[torch.argsort(column[order], stable=True)]
    return order[torch.argsort(batch[order], stable=True)]


def real_rounds(clusters: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
    """Which rounds merged something in the graph of each node, (v, rounds) bool; the others are repetitions."""
    own = torch.arange(len(batch), device=batch.device)[:, None]
    firsts = torch.cat([torch.ones_like(own, dtype=torch.bool), clusters == own], dim=1)
    count = firsts.new_zeros(num_graphs, firsts.shape[1], dtype=torch.int64).index_add(0, batch, firsts.long())
    return (count[:, 1:] < count[:, :-1])[batch]
