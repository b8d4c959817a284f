"""The graph state-space mixer as a convolution layer of PyTorch Geometric; PyG itself is not needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..ssmcore.mixers import GraphSSM, GraphTopology, graph_topology

Mode = Literal["auto", "dag", "general"]


class ChimeraConv(nn.Module):
    """State-space layer on graphs, to be called like the layers of `torch_geometric.nn`.

    Edges go from row 0 of `edge_index` to row 1 and may come in any order. Graphs are found by themselves: nodes that
    no edge passes over begin a new one, so `batch` may be left out, as `GPSConv` does. Sorting the edges costs some
    milliseconds per call; give `topology` to do it once for several layers.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        edge_dim: Features of an edge; None: there are none.
        nheads: Heads, a divisor of `out_channels`.
        d_state: States of a head and channel.
        mode: "dag": weights are means over the edges into a node, and a cycle is refused; "auto": weights are bounded
            as graphs with cycles need it, and graphs without are scanned; "general": the same weights, always solved.
        bidirectional: Also against the edges, with steps of its own.
        **options: Of `omnissm.ssmcore.GraphSSM`, such as `gamma`, `leak_init` and `edge_norm`.

    Raises:
        ValueError: if an option is unknown or out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        edge_dim: int | None = None,
        nheads: int = 4,
        d_state: int = 16,
        mode: Mode = "auto",
        bidirectional: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
        if nheads < 1 or out_channels % nheads:
            raise ValueError(f"out_channels={out_channels} must be a multiple of nheads={nheads}.")
        self.in_channels, self.out_channels, self.edge_dim = in_channels, out_channels, edge_dim
        self.nheads, self.mode = nheads, mode
        self.options = {
            "d_state": d_state,
            "headdim": options.get("expand", 1) * out_channels // nheads,
            "d_edge": edge_dim,
            "acyclic": mode == "dag",
            "bidirectional": bidirectional,
            **options,
        }
        self.lin = nn.Identity() if in_channels == out_channels else nn.Linear(in_channels, out_channels, bias=False)
        self.mixer = GraphSSM(out_channels, **self.options)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, in place."""
        place = next(self.mixer.parameters())
        fresh = GraphSSM(self.out_channels, **self.options, device=place.device)
        with torch.no_grad():
            for old, new in zip(self.mixer.parameters(), fresh.parameters(), strict=True):
                old.copy_(new)
        if isinstance(self.lin, nn.Linear):
            self.lin.reset_parameters()

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        *,
        topology: GraphTopology | None = None,
    ) -> Tensor:
        """Mix nodes.

        Args:
            x: Nodes, (v, in_channels).
            edge_index: Source and target of each edge, (2, e).
            edge_attr: Features of the edges, (e, edge_dim) or (e,).
            batch: Graph of each node, (v,); only checked, results do not depend on it.
            topology: `omnissm.ssmcore.mixers.graph_topology(edge_index, v)`, to share it between layers.

        Returns:
            (v, out_channels).

        Raises:
            ValueError: if shapes disagree, an edge names a node that is not there or joins two graphs, or mode is "dag"
                and there is a cycle.
        """
        if x.dim() != 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"`x` must have shape (nodes, {self.in_channels}), got {tuple(x.shape)}.")
        if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < len(x):
            wrong = int(edge_index.min()) if int(edge_index.min()) < 0 else int(edge_index.max())
            raise ValueError(f"`edge_index` names node {wrong}, expected ids from 0 to {len(x) - 1}.")
        if batch is not None and bool((batch[edge_index[0]] != batch[edge_index[1]]).any()):
            raise ValueError("an edge joins two graphs of the batch; they must be separate.")
        if topology is None:
            topology = graph_topology(edge_index, len(x), ptr=separate_ptr(edge_index, len(x)))
        if self.mode == "general":
            parts = {name: replace(getattr(topology, name), order=None) for name in ("edges", "reverse")}
            topology = replace(topology, **parts, chains=None)
        if edge_attr is not None and edge_attr.dim() == 1:
            edge_attr = edge_attr[:, None]
        return self.mixer(self.lin(x), topology, edge_attr=edge_attr)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, nheads={self.nheads})"


def separate_ptr(edge_index: Tensor, num_nodes: int) -> Tensor:
    """First nodes of the smallest runs of nodes that no edge leaves, and v: a `ptr` for any edges, (runs + 1,)."""
    low, high = edge_index.amin(0), edge_index.amax(0)
    covered = torch.zeros(num_nodes + 1, dtype=torch.int64, device=edge_index.device)
    ones = torch.ones_like(low)
    covered.index_add_(0, low + 1, ones).index_add_(0, high + 1, -ones)
    inside = covered.cumsum(0)[:num_nodes] > 0  # an edge spans the gap before this node
    ends = torch.tensor([num_nodes], device=edge_index.device)
    return torch.cat([(~inside).nonzero()[:, 0], ends])
