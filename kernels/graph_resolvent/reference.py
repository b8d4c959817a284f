"""The definition, one graph after the other: y = ((I - A)^{-1} * (C B^T)) x with the dense inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from .edges import GraphEdges


def graph_resolvent_reference(x: Tensor, weight: Tensor, B: Tensor, C: Tensor, edges: GraphEdges) -> Tensor:
    """See `graph_resolvent`; `weight` (e, h) is what an edge multiplies a state with."""
    heads, groups = x.shape[1], B.shape[1]
    values = x.to(weight.dtype)
    B, C = (tensor.to(weight.dtype).repeat_interleave(heads // groups, dim=1) for tensor in (B, C))
    sorted_weight = weight[edges.edge_perm]
    results = []
    for start, stop in zip(edges.ptr.tolist(), edges.ptr.tolist()[1:]):
        size, part = stop - start, slice(start, stop)
        first, last = int(edges.row_ptr[start]), int(edges.row_ptr[stop])
        places = (
            torch.arange(heads, device=x.device)[:, None],
            edges.dst[first:last] - start,
            edges.src[first:last] - start,
        )
        A = weight.new_zeros(heads, size, size).index_put(places, sorted_weight[first:last].mT, accumulate=True)
        mask = torch.linalg.inv(torch.eye(size, dtype=A.dtype, device=A.device) - A)
        kernel = torch.einsum("uhn,vhn->huv", C[part], B[part])
        results.append(torch.einsum("huv,vhp->uhp", mask * kernel, values[part]))
    return torch.cat(results).to(x.dtype)
