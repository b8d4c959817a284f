"""GSM++: message passing, then a recurrent model and attention over sequences of a hierarchy of clusters.

    x = GatedGCN(x), several times;   x = Mamba2(sequences of x), twice;   x = MLP(attention(x))

Source: Behrouz, Parviz, Karami, Sanford, Perozzi & Mirrokni (2025), "Best of Both Worlds", section 5. Their position
encoding of the hierarchy and their router between kinds of sequences are not part of it.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ...ssmcore import RMSNorm
from ...ssmcore.mixers import Mamba2
from ..hierarchy import leaf_order, real_rounds
from .layers import FeedForward, MessageLayer, View
from .message_passing import GraphAttention, add_up

Sequence = Literal["order", "paths"]
MAX_LEVELS = 64  # a tree of clusters over v nodes has at most log2(v) + 2


class HybridLayer(nn.Module):
    """Local message passing, Mamba-2 over sequences of clusters, and a transformer block.

    Sequences of "order" depend on how nodes are numbered, and results with them: among children of a cluster the one
    with the smaller node comes first. So do, with either kind, clusters between which distances are equal. The order
    of edges makes no difference.

    Args:
        d_model: Width.
        has_edges: Whether edges have features; the learned direction of an edge is one in any case.
        sequence: "order": all nodes of a graph, depth first through the tree of clusters; "paths": for each node the
            clusters that hold it, from the whole graph down, each as the mean of its nodes, and then the node.
        local_layers: Layers of GatedGCN.
        mamba_layers: Layers of Mamba-2.
        nheads: Heads of the attention.
        d_state: States of Mamba-2.
        headdim: Channels of its heads; twice `d_model` is a multiple of it.
        dropout: Share of channels set to zero.

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    uses_topology = False
    uses_clusters = True
    uses_edges = True

    def __init__(
        self,
        d_model: int,
        *,
        has_edges: bool = False,
        sequence: Sequence = "order",
        local_layers: int = 2,
        mamba_layers: int = 2,
        nheads: int = 4,
        d_state: int = 16,
        headdim: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if sequence not in get_args(Sequence):
            raise ValueError(f"sequence must be one of {', '.join(get_args(Sequence))}, got {sequence!r}.")
        if local_layers < 1 or mamba_layers < 1:
            raise ValueError(f"local_layers and mamba_layers must be positive, got {local_layers} and {mamba_layers}.")
        self.sequence = sequence
        self.local = nn.ModuleList(
            MessageLayer(d_model, kind="gated_gcn", dropout=dropout, update_edges=i + 1 < local_layers)
            for i in range(local_layers)
        )
        self.levels = nn.Parameter(torch.randn(MAX_LEVELS, d_model) * 0.1) if sequence == "paths" else None
        self.norms = nn.ModuleList(RMSNorm(d_model) for _ in range(mamba_layers))
        self.mixers = nn.ModuleList(Mamba2(d_model, d_state=d_state, headdim=headdim) for _ in range(mamba_layers))
        self.dropout = nn.Dropout(dropout)
        self.norm = RMSNorm(d_model)
        self.attention = GraphAttention(d_model, nheads)
        self.mlp = FeedForward(d_model, dropout=dropout)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("levels",)

    def forward(self, x: Tensor, edges: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """New nodes (v, d) and edges (m, d)."""
        for layer in self.local:
            x, edges = layer(x, edges, view)
        if len(x):
            assert view.clusters is not None
            x = self._along_order(x, view) if self.sequence == "order" else self._along_paths(x, view, view.clusters)
        return self.mlp(x + self.dropout(self.attention(self.norm(x), view.batch, view.ptr))), edges

    def _along_order(self, x: Tensor, view: View) -> Tensor:
        assert view.clusters is not None
        order = leaf_order(view.clusters, view.batch)
        line, number = x[order][None], view.batch[order][None]
        for norm, mixer in zip(self.norms, self.mixers):
            line = line + self.dropout(mixer(norm(line), seq_idx=number))
        return torch.empty_like(x).index_copy(0, order, line[0])

    def _along_paths(self, x: Tensor, view: View, clusters: Tensor) -> Tensor:
        assert self.levels is not None
        rounds = [x]
        for column in clusters.unbind(1):
            count = torch.bincount(column, minlength=len(x)).clamp(min=1).to(x.dtype)[:, None]
            rounds.append((add_up(x, column, len(x)) / count)[column])
        real = real_rounds(clusters, view.batch, len(view.ptr) - 1)
        mask = torch.cat([real.new_ones(len(x), 1), real], dim=1).flip(1)
        path = (torch.stack(rounds, dim=1) + self.levels[: len(rounds)]).flip(1)
        for norm, mixer in zip(self.norms, self.mixers):
            path = path + self.dropout(mixer(norm(path), mask=mask))
        return path[:, -1]
