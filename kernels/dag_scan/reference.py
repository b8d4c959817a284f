"""The recurrence as a loop over the nodes in topological order, the definition for the other paths."""

from __future__ import annotations

import torch
from torch import Tensor

from .order import DagOrder


def dag_scan_reference(
    x: Tensor, weight: Tensor, B: Tensor, C: Tensor, edge_index: Tensor, order: DagOrder, reverse: bool
) -> Tensor:
    """See `dag_scan`; `weight` (e, h) is what an edge multiplies a state with."""
    heads, groups = x.shape[1], B.shape[1]
    wide = weight.dtype
    B, C = (tensor.to(wide).repeat_interleave(heads // groups, dim=1) for tensor in (B, C))
    inputs = x.to(wide)[..., None] * B[:, :, None]
    source, target = edge_index.tolist() if not reverse else edge_index.flip(0).tolist()
    into: list[list[tuple[int, int]]] = [[] for _ in range(len(x))]
    for edge, (u, v) in enumerate(zip(source, target)):
        into[v].append((edge, u))
    states: dict[int, Tensor] = {}
    for node in order.perm.tolist() if not reverse else order.perm.flip(0).tolist():
        state = inputs[node]
        for edge, u in into[node]:
            state = state + weight[edge][:, None, None] * states[u]
        states[node] = state
    stacked = torch.stack([states[node] for node in range(len(x))])
    return (stacked * C[:, :, None]).sum(-1).to(x.dtype)
