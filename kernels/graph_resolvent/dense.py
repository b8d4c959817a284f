"""Dense forms, graphs of similar size together: the inverse of I - A, or the first terms of its series.

Padded rows and columns of A are zero, so I - A stays invertible and padding never reaches a node.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .edges import Bucket, GraphEdges


def dense(x: Tensor, weight: Tensor, B: Tensor, C: Tensor, edges: GraphEdges, largest: int | None = None) -> Tensor:
    """Exact; by the mask (I - A)^{-1} for small graphs, by the states for those with more nodes than state numbers.

    Graphs of more than `largest` nodes are left out: zeros.
    """
    groups, size = B.shape[1:]
    results: list[Tensor] = []
    nodes: list[Tensor] = []
    for bucket in edges.in_buckets():
        if largest is not None and bucket.size > largest:
            continue
        A = adjacency(weight, bucket)
        identity = torch.eye(bucket.size, dtype=A.dtype, device=A.device)
        values, keys, readers = (_gather(tensor, bucket) for tensor in (x, B, C))
        if bucket.size <= size * x.shape[2]:
            y = _apply_mask(torch.linalg.inv_ex(identity - A)[0], values, keys, readers)
        else:
            graphs, (heads, headdim) = len(values), x.shape[1:]
            inputs = values.unflatten(2, (groups, -1))[..., None] * keys[:, :, :, None, None]
            inputs = inputs.reshape(graphs, bucket.size, heads, headdim * size).transpose(1, 2)
            states = torch.linalg.solve_ex(identity - A, inputs)[0].transpose(1, 2)
            states = states.reshape(graphs, bucket.size, groups, -1, size)
            y = (states @ readers[..., None]).reshape(values.shape)
        _collect(y, bucket, results, nodes)
    return _without_padding(results, nodes, len(x))


def series(x: Tensor, weight: Tensor, B: Tensor, C: Tensor, edges: GraphEdges, terms: int | None) -> Tensor:
    """The first terms of sum A^k, as many as each graph needs by itself; exact for graphs without cycles.

    The sum of 2^m terms is the product of I + A^(2^j) over j < m.
    """
    results: list[Tensor] = []
    nodes: list[Tensor] = []
    for bucket in edges.in_buckets():
        A = adjacency(weight, bucket)
        doublings = _doublings(bucket, terms)
        identity = torch.eye(bucket.size, dtype=A.dtype, device=A.device)
        mask, power = identity.expand_as(A), A
        for j in range(int(doublings.max())):
            longer = mask + power @ mask
            mask = torch.where((doublings > j)[:, None, None, None], longer, mask)
            power = power @ power
        values, keys, readers = (_gather(tensor, bucket) for tensor in (x, B, C))
        _collect(_apply_mask(mask, values, keys, readers), bucket, results, nodes)
    return _without_padding(results, nodes, len(x))


def adjacency(weight: Tensor, bucket: Bucket) -> Tensor:
    """A[target, source] of each graph and head, (graphs, h, size, size)."""
    heads, (graphs, size) = weight.shape[1], bucket.nodes.shape
    numbers = torch.arange(heads, device=weight.device)[:, None]
    places = (bucket.graph.expand(heads, -1), numbers, bucket.dst.expand(heads, -1), bucket.src.expand(heads, -1))
    return weight.new_zeros(graphs, heads, size, size).index_put(places, weight[bucket.edges].mT, accumulate=True)


def _doublings(bucket: Bucket, terms: int | None) -> Tensor:
    """log2 of the terms for each graph of a bucket: given, or such that every walk to the farthest node is counted."""
    graphs, size = bucket.nodes.shape
    if terms is not None:
        return torch.full((graphs,), (terms - 1).bit_length(), device=bucket.nodes.device)
    adjacent = torch.zeros(graphs, size, size, device=bucket.nodes.device)
    adjacent[bucket.graph, bucket.dst, bucket.src] = 1
    reached = torch.eye(size, device=adjacent.device).expand_as(adjacent)
    walk, longest = reached, torch.zeros(graphs, dtype=torch.long, device=adjacent.device)
    cyclic = torch.zeros(graphs, dtype=torch.bool, device=adjacent.device)
    for length in range(1, size):
        # A DAG needs its longest path, along which walks of every length exist; a graph with cycles its diameter.
        walk = ((adjacent @ walk) > 0).to(walk.dtype)
        larger = torch.maximum(reached, walk)
        cyclic |= torch.diagonal(walk, dim1=1, dim2=2).any(1)
        needed = (larger > reached).flatten(1).any(1) | (walk.flatten(1).any(1) & ~cyclic)
        if not bool(needed.any()):
            break
        longest = torch.where(needed, length, longest)
        reached = larger
    return torch.ceil(torch.log2((longest + 1).double())).long()


def _apply_mask(mask: Tensor, values: Tensor, keys: Tensor, readers: Tensor) -> Tensor:
    """y = (mask * (C B^T)) x; mask (graphs, h, size, size)."""
    heads, groups = values.shape[2], keys.shape[2]
    kernel = torch.einsum("bugn,bvgn->bguv", readers, keys).repeat_interleave(heads // groups, dim=1)
    return torch.einsum("bhuv,bvhp->buhp", mask * kernel, values)


def _gather(tensor: Tensor, bucket: Bucket) -> Tensor:
    """(v, ...) -> (graphs, size, ...), zeros at the padding."""
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, 1])[bucket.nodes]


def _collect(y: Tensor, bucket: Bucket, results: list[Tensor], nodes: list[Tensor]) -> None:
    results.append(y.flatten(0, 1))
    nodes.append(bucket.nodes.flatten())


def _without_padding(results: list[Tensor], nodes: list[Tensor], count: int) -> Tensor:
    """Rows in the order of the nodes; zeros for nodes that are in no bucket."""
    every = torch.cat(nodes)
    place = torch.full((count + 1,), len(every), dtype=torch.long, device=every.device)
    place[every] = torch.arange(len(every), device=every.device)
    return torch.cat([*results, torch.zeros_like(results[0][:1])])[place[:count]]
