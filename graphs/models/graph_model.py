"""What all graph models share: encoders, layers, and a head for graphs, nodes or pairs of nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...ssmcore import RMSNorm
from ..batch import Graph, GraphBatch
from ..encoders import FeatureEncoder
from ..pyg import as_batch
from .layers import SSMLayer, View
from .message_passing import add_up

Level = Literal["graph", "node", "link"]
READOUTS = ("mean", "sum", "scaled", "log", "max", "sinks")


class GraphModel(nn.Module):
    """Encoders, a stack of layers and a head.

    Args:
        layer: Makes a layer from `d_model`, `has_edges`, `dropout` and the options; see `create_model` for names.
        node_vocab: Categories of each column of node features, or None.
        node_features: Columns of node features that are values.
        edge_vocab: Categories of each column of edge features, or None.
        edge_features: Columns of edge features that are values.
        pe: Columns of positional features.
        num_outputs: Numbers per graph, node or pair.
        level: What is predicted: "graph", "node" or "link" (pairs of nodes, by the inner product of their vectors).
        d_model: Width.
        n_layer: Layers.
        readout: How nodes become a graph: "mean", "sum", "max", "scaled": the sum over the root of their number, "log":
            the logarithm of one and the sum of what is positive, or "sinks": the mean over nodes without an edge
            leaving them; several joined by "+" are laid side by side.
        readout_width: Width of a linear map and GELU that nodes pass before the readout; 0: none.
        sum_scale: What the readout "sum" is multiplied by: one over the usual number of nodes makes sums as large as
            means and maxima are, so that one rate of learning suits all.
        head_layers: Linear maps in the head.
        dropout: Share of channels set to zero.
        node_dropout: Share of nodes whose features are hidden while training; positions and edges stay.
        **options: Of the layers.

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module],
        *,
        node_vocab: Sequence[int] | None = None,
        node_features: int = 0,
        edge_vocab: Sequence[int] | None = None,
        edge_features: int = 0,
        pe: int = 0,
        num_outputs: int = 1,
        level: Level = "graph",
        d_model: int = 64,
        n_layer: int = 4,
        readout: str = "mean",
        readout_width: int = 0,
        sum_scale: float = 1.0,
        head_layers: int = 2,
        dropout: float = 0.0,
        node_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if level not in get_args(Level):
            raise ValueError(f"level must be one of {', '.join(get_args(Level))}, got {level!r}.")
        self.readouts = tuple(str(readout).split("+"))
        if not set(self.readouts) <= set(READOUTS) or len(set(self.readouts)) < len(self.readouts):
            raise ValueError(
                f"readout must be one of {', '.join(READOUTS)}, or several joined by '+', each once; got {readout!r}."
            )
        if readout_width < 0:
            raise ValueError(f"readout_width must not be negative, got {readout_width}.")
        if not sum_scale > 0:
            raise ValueError(f"sum_scale must be positive, got {sum_scale}.")
        if not 0 <= node_dropout < 1:
            raise ValueError(f"node_dropout must be at least 0 and below 1, got {node_dropout}.")
        if level == "link" and num_outputs != 1:
            raise ValueError(f"pairs of nodes have one output, their inner product; got num_outputs={num_outputs}.")
        if min(d_model, n_layer, num_outputs, head_layers) < 1:
            raise ValueError("d_model, n_layer, num_outputs and head_layers must be positive.")
        self.level, self.num_outputs, self.d_model, self.node_dropout = level, num_outputs, d_model, node_dropout
        self.sum_scale = sum_scale
        self.node_encoder = FeatureEncoder(d_model, node_vocab, node_features)
        self.pe_encoder = nn.Linear(pe, d_model) if pe else None
        has_edges = bool(edge_vocab) or edge_features > 0
        self.layers = nn.ModuleList(
            layer(d_model, has_edges=has_edges, dropout=dropout, **options) for _ in range(n_layer)
        )
        if isinstance(last := self.layers[-1], SSMLayer):
            last.as_last()
        uses_edges = any(getattr(made, "uses_edges", False) for made in self.layers)
        self.edge_encoder = FeatureEncoder(d_model, edge_vocab, edge_features) if uses_edges else None
        self.direction = nn.Parameter(torch.randn(2, d_model) * 0.1) if uses_edges else None  # with, against an edge
        self.norm = RMSNorm(d_model)
        parts: list[nn.Module] = []
        wide = bool(readout_width) and level == "graph"
        self.widen = nn.Sequential(nn.Linear(d_model, readout_width), nn.GELU()) if wide else None
        width = (readout_width if wide else d_model) * (len(self.readouts) if level == "graph" else 1)
        for _ in range(head_layers - 1):
            parts += [nn.Linear(width, d_model), nn.GELU(), nn.Dropout(dropout)]
            width = d_model
        self.head = nn.Sequential(*parts, nn.Linear(width, d_model if level == "link" else num_outputs))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("direction",)

    @property
    def uses_topology(self) -> bool:
        """Whether a layer needs the batch's topology."""
        return any(getattr(layer, "uses_topology", False) for layer in self.layers)

    @property
    def uses_clusters(self) -> bool:
        """Whether a layer needs the clusters of the batch's nodes."""
        return any(getattr(layer, "uses_clusters", False) for layer in self.layers)

    def forward(self, batch: GraphBatch | Graph | Any) -> Tensor:
        """Predict.

        Args:
            batch: A batch, one graph, or a `Data` or `Batch` of PyTorch Geometric.

        Returns:
            (graphs, num_outputs), (v, num_outputs) or (q,), as `level` says.

        Raises:
            TypeError: if `batch` is none of these, or features are of the wrong kind.
            ValueError: if features do not fit the model, an edge joins two graphs, or the model is for graphs without
                cycles and there is one.
        """
        batch = as_batch(batch)
        x = self.features(batch)
        if self.level == "graph":
            return self.head(self.pool(x if self.widen is None else self.widen(x), batch))
        y = self.head(x)
        if self.level == "node":
            return y
        if batch.pairs is None:
            raise ValueError("the model predicts pairs of nodes, and the batch names none in `pairs`.")
        return (y[batch.pairs[0]] * y[batch.pairs[1]]).sum(-1) / self.d_model**0.5

    def features(self, batch: GraphBatch | Graph | Any) -> Tensor:
        """Vectors of the nodes after the last layer, (v, d_model)."""
        x, edges, view = self.encode(as_batch(batch))
        for layer in self.layers:
            x, edges = layer(x, edges, view)
        return self.norm(x)

    def encode(self, batch: GraphBatch) -> tuple[Tensor, Tensor, View]:
        """What enters the first layer: nodes (v, d_model), edges (m, d_model), and the view of the batch."""
        x = self.node_encoder(batch.x, batch.num_nodes)
        if self.training and self.node_dropout:
            x = x * (torch.rand(len(x), 1, device=x.device) >= self.node_dropout)
        if self.pe_encoder is not None:
            if batch.pe is None:
                raise ValueError("the model takes positional features, and the batch has no `pe`.")
            x = x + self.pe_encoder(batch.pe.to(x.dtype))
        count = batch.edge_index.shape[1]
        edge_index = batch.edge_index
        both = torch.cat([edge_index, edge_index.flip(0)], dim=1) if batch.is_directed else edge_index
        if self.edge_encoder is None or self.direction is None:
            edges = x.new_zeros(both.shape[1], 0)
        else:
            plain = self.edge_encoder(batch.edge_attr, count)
            edges = plain + self.direction[0]
            if batch.is_directed:
                edges = torch.cat([edges, plain + self.direction[1]])
        topology = batch.with_topology().topology if self.uses_topology else None
        clusters = batch.with_clusters().clusters if self.uses_clusters else None
        return x, edges, View(both, batch.batch, batch.ptr, topology, count, clusters)

    def pool(self, x: Tensor, batch: GraphBatch) -> Tensor:
        """Vectors of the graphs, (graphs, readouts * w), from those of the nodes (v, w); zero for one without nodes."""
        return torch.cat([self._read_out(x, batch, how) for how in self.readouts], dim=1)

    def _read_out(self, x: Tensor, batch: GraphBatch, how: str) -> Tensor:
        if how in ("sum", "scaled"):
            total = add_up(x, batch.batch, batch.num_graphs)
            return (
                total * self.sum_scale
                if how == "sum"
                else total / batch.ptr.diff().clamp(min=1).to(x.dtype).sqrt()[:, None]
            )
        if how == "log":
            return add_up(x.relu(), batch.batch, batch.num_graphs).log1p()
        if how == "max":
            rows = x.new_zeros(batch.num_graphs, x.shape[1])
            return rows.scatter_reduce(0, batch.batch[:, None].expand_as(x), x, "amax", include_self=False)
        weight = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
        if how == "sinks":
            leaving = torch.bincount(batch.edge_index[0], minlength=len(x))
            weight = (leaving == 0).to(x.dtype)[:, None]
        total = add_up(torch.cat([x * weight, weight], dim=1), batch.batch, batch.num_graphs)
        return total[:, :-1] / total[:, -1:].clamp(min=1)
