"""Graphs that are chains, as packed sequences of the one-dimensional scan."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ssd.op import ssd
from .order import DagOrder, chain_order


def dag_scan_of_chains(
    x: Tensor, edge_decay: Tensor, B: Tensor, C: Tensor, edge_index: Tensor, order: DagOrder, reverse: bool
) -> Tensor:
    """See `dag_scan`; logarithms of weights (e, h), none above 0."""
    nodes, chain = chain_order(order)
    if reverse:
        nodes, chain = nodes.flip(0), chain[-1] - chain.flip(0)
    # What a node keeps of the one before it; the first of a chain has none before it.
    kept = edge_decay.new_zeros(len(x), edge_decay.shape[1]).index_copy(0, edge_index[0 if reverse else 1], edge_decay)
    line = (t[nodes][None] for t in (x, kept, B, C))
    y, _ = ssd(*line, seq_idx=chain[None], backend="chunked")
    return y[0][torch.argsort(nodes)]
