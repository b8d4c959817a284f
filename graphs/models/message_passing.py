"""Message passing: graph convolution, GINE, GatedGCN, and attention within each graph."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ssmcore import RMSNorm


def add_up(messages: Tensor, target: Tensor, rows: int) -> Tensor:
    """Sum of the messages (e, d) that reach each of `rows` nodes, in the messages' dtype."""
    return messages.new_zeros(rows, messages.shape[1]).index_add(0, target, messages)


class GCN(nn.Module):
    """x' = D^{-1/2} (A + I) D^{-1/2} x W, with D the number of edges into a node and one.

    Args:
        d_model: Width.

    Source: Kipf & Welling (2017), equation (2).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, edges: Tensor, edge_index: Tensor) -> Tensor:
        """Mix nodes (v, d) along edges (2, e); features of edges are not used."""
        source, target = edge_index
        degree = (1 + torch.bincount(target, minlength=len(x))).to(x.dtype)[:, None]
        scaled = x * degree.rsqrt()
        return self.linear((scaled + add_up(scaled[source], target, len(x))) * degree.rsqrt())


class GINE(nn.Module):
    """x' = MLP((1 + eps) x + sum over edges u->v of relu(x_u + e)).

    Args:
        d_model: Width.

    Source: Hu, Liu, Gomes, Zitnik, Liang, Pande & Leskovec (2020), section 5.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(()))
        self.mlp = nn.Sequential(nn.Linear(d_model, d_model), nn.GELU(), nn.Linear(d_model, d_model))

    def forward(self, x: Tensor, edges: Tensor, edge_index: Tensor) -> Tensor:
        """Mix nodes (v, d) along edges (2, e) with features (e, d)."""
        source, target = edge_index
        return self.mlp((1 + self.eps) * x + add_up(F.relu(x[source] + edges), target, len(x)))


class GatedGCN(nn.Module):
    """Message passing with a gate per edge, which updates nodes and edges.

        e' = D x_v + E x_u + C e;   x' = A x + sum over u->v of sigmoid(e') B x_u / (sum of sigmoid(e') + 1e-6)

    both normalised, through GELU, and added to what came in.

    Args:
        d_model: Width of nodes and edges.
        dropout: Share of the channels set to zero before they are added.
        update_edges: Whether edges change too.

    Source: Bresson & Laurent (2018), equation (11), with edges updated.
    """

    def __init__(self, d_model: int, dropout: float = 0.0, *, update_edges: bool = True) -> None:
        super().__init__()
        self.nodes = nn.Linear(d_model, 4 * d_model)
        self.edges = nn.Linear(d_model, d_model)
        self.node_norm = RMSNorm(d_model)
        self.edge_norm = RMSNorm(d_model) if update_edges else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, edges: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        """New nodes (v, d) and edges (e, d)."""
        source, target = edge_index
        own, sent, from_source, to_target = self.nodes(x).chunk(4, dim=-1)
        logits = to_target[target] + from_source[source] + self.edges(edges)
        gate = logits.sigmoid()
        both = add_up(torch.cat([gate * sent[source], gate], dim=1), target, len(x))
        total, weight = both.chunk(2, dim=1)
        y = own + total / (weight + 1e-6)
        x = x + self.dropout(F.gelu(self.node_norm(y)))
        if self.edge_norm is None:
            return x, edges
        return x, edges + self.dropout(F.gelu(self.edge_norm(logits)))


class GraphAttention(nn.Module):
    """Attention of all nodes of a graph to each other, without regard to edges.

    Args:
        d_model: Width.
        nheads: Heads, a divisor of it.

    Raises:
        ValueError: if it is none.
    """

    def __init__(self, d_model: int, nheads: int = 4) -> None:
        super().__init__()
        if nheads < 1 or d_model % nheads:
            raise ValueError(f"d_model={d_model} must be a multiple of nheads={nheads}.")
        self.nheads = nheads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, batch: Tensor, ptr: Tensor) -> Tensor:
        """Mix nodes (v, d) of each graph; `batch` and `ptr` as in `GraphBatch`."""
        qkv = self.qkv(x)
        y = torch.empty_like(x)
        # Padded to the longest of all, a few large graphs would make the others as large: sizes within 1.5 go together.
        size = ptr.diff()
        kind = torch.where(size > 0, size.clamp(min=8).log2().div(math.log2(1.5)).ceil().long(), -1)
        for one in kind.unique().tolist():
            if one < 0:
                continue
            chosen = kind == one
            nodes = chosen[batch].nonzero()[:, 0]
            row = (chosen.cumsum(0) - 1)[batch[nodes]]
            column = nodes - ptr[batch[nodes]]
            longest = int(size[chosen].max())
            padded = qkv.new_zeros(int(row[-1]) + 1, longest, qkv.shape[1]).index_put((row, column), qkv[nodes])
            mask = torch.arange(longest, device=x.device) < size[chosen][:, None]
            q, k, v = padded.unflatten(-1, (3, self.nheads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
            y = y.index_copy(0, nodes, mixed.transpose(1, 2).flatten(2)[row, column].to(y.dtype))
        return self.out(y)
