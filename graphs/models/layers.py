"""The layers of graph models: each maps nodes and edges of a batch to new ones and adds to what came in."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ...ssmcore import RMSNorm
from ...ssmcore.mixers import GraphSSM, GraphTopology, Hydra
from .message_passing import GCN, GINE, GatedGCN, GraphAttention

Local = Literal["none", "gcn", "gine", "gated_gcn"]
Along = Literal["edges", "order", "both"]


class View(NamedTuple):
    """What layers see of a batch.

    Attributes:
        edge_index: Edges that messages take, (2, m): those of the graph first, and for directed graphs the same once
            more, turned around.
        batch: Graph of each node, (v,).
        ptr: First node of each graph and v, (graphs + 1,).
        topology: Of the graph's own edges; None for models without state-space layers.
        num_edges: The graph's own edges e.
        clusters: Clusters of the nodes by round, (v, rounds); None for models that do not look at them.
    """

    edge_index: Tensor
    batch: Tensor
    ptr: Tensor
    topology: GraphTopology | None
    num_edges: int
    clusters: Tensor | None = None


class FeedForward(nn.Module):
    """x + MLP(norm(x)), with GELU.

    Args:
        d_model: Width.
        factor: Inner width over it.
        dropout: Share of inner and outer channels set to zero.
    """

    def __init__(self, d_model: int, factor: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, factor * d_model),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(factor * d_model, d_model),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to itself."""
        return x + self.mlp(self.norm(x))


class NodeLayer(nn.Module):
    """Every node by itself: no edges at all. The baseline that says how much the nodes alone tell.

    Args:
        d_model: Width.
        has_edges: Whether edges have features; not used.
        dropout: Share of channels set to zero.
    """

    uses_topology = False
    uses_edges = False

    def __init__(self, d_model: int, *, has_edges: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.mlp = FeedForward(d_model, dropout=dropout)

    def forward(self, x: Tensor, edges: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """New nodes (v, d), and edges (m, d) as they are."""
        return self.mlp(x), edges


class MessageLayer(nn.Module):
    """x + gelu(conv(norm(x))), or GatedGCN.

    Args:
        d_model: Width.
        kind: "gcn", "gine" or "gated_gcn".
        has_edges: Whether edges have features; the learned direction of an edge is one in any case.
        dropout: Share of channels set to zero.
        update_edges: Whether GatedGCN changes the edges too.
    """

    uses_topology = False

    def __init__(
        self,
        d_model: int,
        *,
        kind: Local = "gine",
        has_edges: bool = False,
        dropout: float = 0.0,
        update_edges: bool = True,
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.uses_edges = kind != "gcn"
        conv: nn.Module
        match kind:
            case "gcn":
                conv = GCN(d_model)
            case "gine":
                conv = GINE(d_model)
            case "gated_gcn":
                conv = GatedGCN(d_model, dropout, update_edges=update_edges)
            case _:
                raise ValueError(f"kind must be 'gcn', 'gine' or 'gated_gcn', got {kind!r}.")
        self.conv = conv

    def forward(self, x: Tensor, edges: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """New nodes (v, d) and edges (m, d)."""
        if isinstance(self.conv, GatedGCN):
            y, edges = self.conv(self.norm(x), edges, view.edge_index)
            return x + y, edges
        return x + self.dropout(F.gelu(self.conv(self.norm(x), edges, view.edge_index))), edges


class GPSLayer(nn.Module):
    """x + GINE(norm(x)) + attention(norm(x)), then an MLP.

    Args:
        d_model: Width.
        nheads: Heads of the attention.
        has_edges: Whether edges have features; the learned direction of an edge is one in any case.
        dropout: Share of channels set to zero.

    Source: Rampasek, Galkin, Dwivedi, Luu, Wolf & Beaini (2022), section 3, with norms before the branches.
    """

    uses_topology = False
    uses_edges = True

    def __init__(self, d_model: int, *, nheads: int = 4, has_edges: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.local = GINE(d_model)
        self.attention = GraphAttention(d_model, nheads)
        self.dropout = nn.Dropout(dropout)
        self.mlp = FeedForward(d_model, dropout=dropout)

    def forward(self, x: Tensor, edges: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """New nodes (v, d), and edges (m, d) as they are."""
        inner = self.norm(x)
        local = self.dropout(F.gelu(self.local(inner, edges, view.edge_index)))
        return self.mlp(x + local + self.dropout(self.attention(inner, view.batch, view.ptr))), edges


class SSMLayer(nn.Module):
    """Local message passing, the state-space mixer over the graph, and an MLP, one after the other.

    Args:
        d_model: Width.
        local: Message passing before the mixer: "none", "gcn", "gine" or "gated_gcn", which updates the edges that the
            mixer's steps read.
        local_layers: Steps of message passing before the mixer.
        along: What states follow: "edges": the graph's, by `GraphSSM`; "order": the nodes of a graph in the order of
            their numbers, both ways, by Hydra; "both": the order after the edges. Of a tree whose nodes are numbered
            depth first the order is its text, which the edges do not tell. Numbers matter then: renumbered nodes give
            other answers.
        has_edges: Whether edges have features; else only "gated_gcn" gives the mixer any.
        mlp: Inner width of the MLP over `d_model`; 0 for none.
        dropout: Share of channels set to zero.
        **mixer: Options of `GraphSSM`; Hydra takes `d_state`, `headdim` and `expand` from them.

    Raises:
        ValueError: if an option is unknown.

    Source: Lahoti, Marwah, Puduppully & Gu (2025), the graph model of section 5, with norms per node; Hwang, Lahoti,
    Dao & Gu (2024) for the order.
    """

    def __init__(
        self,
        d_model: int,
        *,
        local: Local = "none",
        local_layers: int = 1,
        along: Along = "edges",
        has_edges: bool = False,
        mlp: int = 2,
        dropout: float = 0.0,
        **mixer: Any,
    ) -> None:
        super().__init__()
        for name, value, choices in (("local", local, Local), ("along", along, Along)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}.")
        if local_layers < 1:
            raise ValueError(f"local_layers must be positive, got {local_layers}; local='none' is for none.")
        steps = 0 if local == "none" else local_layers
        self.local = MessageLayer(d_model, kind=local, dropout=dropout) if steps else None
        self.further = nn.ModuleList(MessageLayer(d_model, kind=local, dropout=dropout) for _ in range(1, steps))
        self.uses_topology = along != "order"
        in_steps = self.uses_topology and (has_edges or local == "gated_gcn")
        self.uses_edges = in_steps or local in ("gine", "gated_gcn")
        self.norm: RMSNorm | None = None
        self.mixer: GraphSSM | None = None
        if self.uses_topology:
            self.norm = RMSNorm(d_model)
            self.mixer = GraphSSM(d_model, d_edge=d_model if in_steps else None, **mixer)
        self.order_norm: RMSNorm | None = None
        self.order_mixer: Hydra | None = None
        if along != "edges":
            sizes: dict[str, Any] = {"d_state": 16, "headdim": 16, "expand": 1}
            sizes |= {name: mixer[name] for name in sizes if name in mixer}
            self.order_norm, self.order_mixer = RMSNorm(d_model), Hydra(d_model, **sizes)
        self.dropout = nn.Dropout(dropout)
        self.mlp = FeedForward(d_model, mlp, dropout) if mlp else None

    def as_last(self) -> None:
        """Prepare to be the last layer, whose edges no other reads: they are updated for its own mixer only."""
        last = self.further[-1] if self.further else self.local
        if self.mixer is None and isinstance(last, MessageLayer) and isinstance(last.conv, GatedGCN):
            last.conv.edge_norm = None

    def forward(self, x: Tensor, edges: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """New nodes (v, d) and edges (m, d)."""
        if self.local is not None:
            x, edges = self.local(x, edges, view)
        for layer in self.further:
            x, edges = layer(x, edges, view)
        if self.mixer is not None and self.norm is not None:
            assert view.topology is not None
            edge_attr = None if self.mixer.d_edge is None else edges[: view.num_edges]
            x = x + self.dropout(self.mixer(self.norm(x), view.topology, edge_attr=edge_attr))
        if self.order_mixer is not None and self.order_norm is not None and len(x):
            line = self.order_mixer(self.order_norm(x)[None], seq_idx=view.batch[None])
            x = x + self.dropout(line[0])
        return x if self.mlp is None else self.mlp(x), edges
