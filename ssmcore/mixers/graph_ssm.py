"""`graph_ssm`: a state-space mixer over the nodes of graphs, acyclic or not.

    [z, x, B, C, steps] = in_proj(u);   x, B, C = silu(conv(...));   step_e from the softplus of the nodes' steps
    S_v = gain_v x_v B_v^T + sum over edges u->v of a_uv S_u;   y_v = S_v C_v + D x_v
    out_proj(rms_norm(y silu(z)))

Source: Lahoti, Marwah, Puduppully & Gu (2025), "Chimera: State Space Models Beyond Sequences", sections 3 and 4.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import (
    GraphEdges,
    chain_order,
    dag_order,
    dag_scan,
    gated_norm,
    graph_edges,
    graph_resolvent,
    grid_scan,
    ssd,
)
from ..init import dt_bias_init, inverse_softplus, no_weight_decay

EdgeStep = Literal["target", "mean", "rms", "symmetric"]
EdgeNorm = Literal["none", "sqrt_in", "sqrt_both", "in", "out", "in_sum", "sym"]
Gain = Literal["target_step", "own"]
Conv = Literal["none", "gcn", "depthwise"]
Method = Literal["auto", "dense", "series", "iterative"]


@dataclass(frozen=True)
class GraphTopology:
    """The edges of a batch of graphs and all that is worked out from them once, for every layer.

    Attributes:
        edge_index: Source and target of each edge, (2, e).
        edges: What `graph_edges` makes of them; `edges.order` is the topological order, if there is one.
        reverse: The same for the edges turned around.
        chains: For graphs of chains: the nodes in one line and the number of each one's chain; else None.
        grid: For grids of one size, numbered row by row, with edges to the right and down: their number, rows and
            columns; else None.
    """

    edge_index: Tensor
    edges: GraphEdges
    reverse: GraphEdges
    chains: tuple[Tensor, Tensor] | None
    grid: tuple[int, int, int] | None = None

    @property
    def acyclic(self) -> bool:
        """Whether no graph has a cycle."""
        return self.edges.order is not None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> GraphTopology:
        """The same topology on another device."""
        options: dict[str, Any] = {"non_blocking": non_blocking}
        chains = self.chains and (self.chains[0].to(device, **options), self.chains[1].to(device, **options))
        moved = {name: getattr(self, name).to(device, **options) for name in ("edge_index", "edges", "reverse")}
        return replace(self, **moved, chains=chains)


def graph_topology(edge_index: Tensor, num_nodes: int, *, ptr: Tensor | None = None) -> GraphTopology:
    """Work out the topology of a batch of graphs; see `graph_edges` for arguments and errors."""
    edges = graph_edges(edge_index, num_nodes, ptr=ptr)
    chains = None
    if edges.order is not None and edges.order.kind == "chains":
        chains = chain_order(edges.order)
    grid = _grid(edge_index.detach().cpu(), edges.ptr.cpu()) if edges.order is not None else None
    return GraphTopology(edge_index, edges, graph_edges(edge_index.flip(0), num_nodes, ptr=ptr), chains, grid)


def _grid(edge_index: Tensor, ptr: Tensor) -> tuple[int, int, int] | None:
    """Number, rows and columns of the grids that the edges are, all at least two; None if they are something else."""
    sizes = ptr.diff()
    first = edge_index[1, edge_index[0] == 0].sort().values.tolist()
    if len(first) != 2 or first[0] != 1 or bool((sizes != sizes[0]).any()):
        return None
    count, size, columns = len(sizes), int(sizes[0]), first[1]
    rows = size // columns if columns > 1 else 0
    if rows < 2 or rows * columns != size:
        return None
    cells = torch.arange(count * size).view(count, rows, columns)
    across, down = (cells[:, :, :-1], cells[:, :, 1:]), (cells[:, :-1], cells[:, 1:])
    expected = torch.cat([u.flatten() * count * size + v.flatten() for u, v in (across, down)]).sort().values
    found = (edge_index[0] * count * size + edge_index[1]).sort().values
    return (count, rows, columns) if torch.equal(found, expected) else None


class GraphSSM(nn.Module):
    """State-space mixer over the nodes of graphs.

    Args:
        d_model: Width of the stream.
        d_state: States n of a head and channel.
        headdim: Channels p of a head; expand * d_model is a multiple of it.
        expand: Inner width over `d_model`.
        ngroups: Groups g that share B and C.
        d_edge: Features of an edge, which lengthen its step; None: there are none.
        acyclic: Whether graphs must have no cycle; decides the defaults below.
        bidirectional: Also scan against the edges, with steps of its own; results are added and divided by sqrt(2).
        edge_step: How far an edge decays: "target": the target's step (a chain then is Mamba-2); "mean" or "rms": of
            both ends and the edge, divided by their number or its root; "symmetric": equal in both directions.
            None: "target" if acyclic, else "mean".
        edge_norm: What weights are divided by: "none"; "sqrt_in", "sqrt_both", "in": functions of the number of edges
            into the target (and source), the first of which lets states of deep graphs grow where steps are short;
            "out", "in_sum": sums of weights that leave the source (enter the target), times `gamma`; "sym": both, needs
            symmetric steps. None: "in" if acyclic, else "out".
        input_gain: "target_step": the target's step, as in Mamba-2; "own": a step of its own. None: "target_step" with
            edge_step "target", else "own".
        learn_a: Learn the decay rate of each head, else 1.
        gamma: Largest sum of weights for "out", "in_sum", "sym", in (0, 1); the closer to 1, the farther nodes see.
        leak_init: Where the leak starts that those sums contain, in (0, 1).
        dt_min: Shortest step at the start.
        dt_max: Longest.
        conv: What x, B and C go through: "none"; "depthwise": a number per channel for the node and for the sum of
            those before it; "gcn": a graph convolution.
        norm_before_gate: Normalise before gating.
        method: How graphs with cycles are solved; see `graph_resolvent`.
        device: Where to create the parameters.
        dtype: Their dtype; recurrence parameters stay float32 or wider.

    Raises:
        ValueError: if an option is unknown or out of range, sizes do not divide, or "sym" comes without symmetric
            steps.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        headdim: int = 16,
        expand: int = 1,
        ngroups: int = 1,
        d_edge: int | None = None,
        acyclic: bool = True,
        bidirectional: bool = False,
        edge_step: EdgeStep | None = None,
        edge_norm: EdgeNorm | None = None,
        input_gain: Gain | None = None,
        learn_a: bool = False,
        gamma: float = 0.99,
        leak_init: float = 0.1,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        conv: Conv = "none",
        norm_before_gate: bool = False,
        method: Method = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.headdim, self.ngroups, self.d_edge = d_model, d_state, headdim, ngroups, d_edge
        self.d_inner = expand * d_model
        if self.d_inner % headdim:
            raise ValueError(f"expand * d_model = {self.d_inner} must be a multiple of headdim={headdim}.")
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise ValueError(f"the {self.nheads} heads must be a multiple of ngroups={ngroups}.")
        self.acyclic, self.bidirectional = acyclic, bidirectional
        self.edge_step: EdgeStep = edge_step or ("target" if acyclic else "mean")
        self.edge_norm: EdgeNorm = edge_norm or ("in" if acyclic else "out")
        self.input_gain: Gain = input_gain or ("target_step" if self.edge_step == "target" else "own")
        for name, value, choices in (
            ("edge_step", self.edge_step, EdgeStep),
            ("edge_norm", self.edge_norm, EdgeNorm),
            ("input_gain", self.input_gain, Gain),
            ("conv", conv, Conv),
            ("method", method, Method),
        ):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}.")
        if self.edge_norm == "sym" and self.edge_step != "symmetric":
            raise ValueError(f"edge_norm='sym' needs edge_step='symmetric', got {self.edge_step!r}.")
        if not 0 < gamma < 1 or not 0 < leak_init < 1:
            raise ValueError(f"gamma and leak_init must lie between 0 and 1, got {gamma} and {leak_init}.")
        self.gamma, self.conv, self.norm_before_gate, self.method = gamma, conv, norm_before_gate, method

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device}
        wide["dtype"] = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.growth_seen = self.edge_norm != "sqrt_in"
        self.step_names = self._needed_steps()
        directions, width = 1 + bidirectional, self.d_inner + 2 * ngroups * d_state
        self.n_steps = directions * len(self.step_names) * self.nheads
        self.in_proj = nn.Linear(d_model, self.d_inner + width + self.n_steps, bias=False, **factory)
        if d_edge is not None:
            self.edge_proj = nn.Linear(d_edge, directions * self.nheads, bias=False, **factory)
        if conv == "depthwise":
            self.conv_self = nn.Parameter(torch.ones(width, **factory))
            self.conv_neighbours = nn.Parameter(torch.randn(width, **factory) * 0.1)
        elif conv == "gcn":
            self.conv_proj = nn.Linear(width, width, bias=False, **factory)
        self.dt_bias = nn.Parameter(dt_bias_init((directions, self.nheads), dt_min, dt_max, **wide))
        no_weight_decay(self.dt_bias)
        if "leak" in self.step_names:
            start = inverse_softplus(torch.tensor(-math.log(leak_init), dtype=torch.float64))
            self.leak_bias = nn.Parameter(torch.full((directions, self.nheads), float(start), **wide))
            no_weight_decay(self.leak_bias)
        self.A_log = nn.Parameter(torch.zeros(directions, self.nheads, **wide)) if learn_a else None
        if self.A_log is not None:
            no_weight_decay(self.A_log)
        self.D = nn.Parameter(torch.ones(self.nheads, **wide))
        no_weight_decay(self.D)
        self.norm_weight = nn.Parameter(torch.ones(self.d_inner, **factory))
        no_weight_decay(self.norm_weight)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **factory)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("dt_bias", "leak_bias", "A_log", "D", "norm_weight")

    def _needed_steps(self) -> list[str]:
        names = ["target"]
        if self.edge_step in ("mean", "rms"):
            names.append("source")
        if self.edge_norm in ("out", "in_sum"):
            names.append("leak")
        if self.input_gain == "own":
            names.append("gain")
        return names

    def forward(self, x: Tensor, graph: GraphTopology, *, edge_attr: Tensor | None = None) -> Tensor:
        """Mix along the edges of a batch of graphs.

        Args:
            x: Nodes, (v, d_model).
            graph: `graph_topology(edge_index, v)`, on the device of `x`.
            edge_attr: Features of the edges, (e, d_edge), if the mixer was made with `d_edge`.

        Returns:
            (v, d_model).

        Raises:
            ValueError: if shapes disagree, edge features are missing or unexpected, or the mixer is for graphs without
                cycles and there is one.
        """
        z, values, inputs = self._inputs(x, graph, edge_attr)
        mixed = torch.stack([self._scan(scan, graph, direction) for direction, scan in enumerate(inputs)]).sum(0)
        total = mixed / math.sqrt(len(inputs)) + self.D.to(values.dtype)[:, None] * values
        y = gated_norm(total.flatten(1).to(z.dtype), z, self.norm_weight, norm_before_gate=self.norm_before_gate)
        return self.out_proj(y)

    def mixing_matrix(self, x: Tensor, graph: GraphTopology, *, edge_attr: Tensor | None = None) -> Tensor:
        """How much each node's value weighs in each node's output before gate and norm, (h, v, v).

        Rows are outputs, columns inputs.

        The product with the values of the heads, (v, h, p), is the output that the gate receives.
        """
        nodes = len(x)
        _, _, inputs = self._inputs(x, graph, edge_attr)
        heads = torch.eye(nodes, device=x.device, dtype=inputs[0].values.dtype)
        found = []
        for direction, scan in enumerate(inputs):
            unit = heads[:, None].expand(-1, self.nheads, -1) * scan.gain[..., None]
            plain = heads[:, None].expand(-1, self.nheads, -1)
            found.append(self._scan(replace(scan, values=unit, plain=plain), graph, direction))
        mask = torch.stack(found).sum(0).movedim(1, 0) / math.sqrt(len(inputs))
        return mask + self.D.to(mask.dtype)[:, None, None] * heads

    def _inputs(self, x: Tensor, graph: GraphTopology, edge_attr: Tensor | None) -> tuple[Tensor, Tensor, list[_Scan]]:
        """Gate (v, d_inner), values (v, h, p), and what each direction's scan takes."""
        if x.dim() != 2 or x.shape[1] != self.d_model or len(x) != graph.edges.num_nodes:
            raise ValueError(
                f"`x` must be ({graph.edges.num_nodes}, {self.d_model}) for this graph, got shape {tuple(x.shape)}."
            )
        if (edge_attr is None) is not (self.d_edge is None):
            missing = "is missing" if edge_attr is None else "was not expected"
            raise ValueError(f"`edge_attr` {missing}: the mixer was made with d_edge={self.d_edge}.")
        if edge_attr is not None and tuple(edge_attr.shape) != (graph.edges.num_edges, self.d_edge):
            expected = (graph.edges.num_edges, self.d_edge)
            raise ValueError(f"`edge_attr` must have shape {expected}, got {tuple(edge_attr.shape)}.")
        if self.acyclic and not graph.acyclic:
            ptr = graph.edges.ptr
            number = torch.repeat_interleave(torch.arange(len(ptr) - 1, device=ptr.device), ptr.diff())
            try:
                dag_order(graph.edge_index, graph.edges.num_nodes, batch=number)
            except ValueError as error:
                raise ValueError(
                    f"This mixer is for graphs without cycles; acyclic=False is for others. {error}"
                ) from None
        heads, directions = self.nheads, 1 + self.bidirectional
        size = self.ngroups * self.d_state
        z, xBC, raw = self.in_proj(x).split([self.d_inner, self.d_inner + 2 * size, self.n_steps], dim=-1)
        values, B, C = F.silu(self._convolve(xBC, graph)).split([self.d_inner, size, size], dim=-1)
        values = values.unflatten(-1, (heads, self.headdim))
        B, C = (tensor.unflatten(-1, (self.ngroups, self.d_state)) for tensor in (B, C))
        with torch.autocast(x.device.type, enabled=False):
            raw = raw.to(self.dt_bias.dtype).unflatten(-1, (directions, len(self.step_names), heads))
            edge_raw = None
            if edge_attr is not None:
                edge_raw = self.edge_proj(edge_attr.to(self.edge_proj.weight.dtype))
                edge_raw = edge_raw.to(self.dt_bias.dtype).unflatten(-1, (directions, heads))
            wide = values.to(torch.promote_types(values.dtype, self.dt_bias.dtype))
            scans = []
            for direction in range(directions):
                steps = {
                    name: F.softplus(raw[:, direction, i] + self._bias(name)[direction])
                    for i, name in enumerate(self.step_names)
                }
                edge = None if edge_raw is None else F.softplus(edge_raw[:, direction] + self.dt_bias[direction])
                ends = graph.edge_index if direction == 0 else graph.edge_index.flip(0)
                gain = steps["gain" if self.input_gain == "own" else "target"]
                if not self.growth_seen and not torch.compiler.is_compiling():
                    self._warn_of_growth(steps, edge, graph, direction)
                decay = self._edge_decay(steps, edge, ends, direction)
                scans.append(_Scan(wide * gain[..., None], decay, B, C, gain, wide))
        return z, wide, scans

    def _bias(self, name: str) -> Tensor:
        return self.leak_bias if name == "leak" else self.dt_bias

    def _warn_of_growth(
        self, steps: dict[str, Tensor], edge: Tensor | None, graph: GraphTopology, direction: int
    ) -> None:
        """Say once that paths of a deep DAG multiply: two that meet with weights over sqrt(2) need steps of ln(2)/2."""
        order = graph.edges.order
        if order is None or order.kind != "dag" or order.num_levels <= 33:
            return
        self.growth_seen = True
        ends = graph.edge_index if direction == 0 else graph.edge_index.flip(0)
        step = self._edge_steps(steps, edge, *ends).detach()
        rate = 1.0 if self.A_log is None else self.A_log[direction].detach().exp()
        if float((rate * step).mean()) < 0.35:
            warnings.warn(
                f"edge_norm='sqrt_in' on a graph of {order.num_levels} levels with short steps: states may grow with "
                "every level. edge_norm='in' keeps them bounded.",
                stacklevel=4,
            )

    def _edge_decay(self, steps: dict[str, Tensor], edge: Tensor | None, ends: Tensor, direction: int) -> Tensor:
        """Logarithms of the weights, (e, h)."""
        source, target = ends
        step = self._edge_steps(steps, edge, source, target)
        rate = 1.0 if self.A_log is None else self.A_log[direction].exp()
        decay = -rate * step
        nodes = len(steps["target"])

        def degree(end: Tensor) -> Tensor:
            return torch.bincount(end, minlength=nodes).to(decay.dtype)[:, None]

        def sums(end: Tensor) -> Tensor:
            return decay.new_zeros(nodes, decay.shape[1]).index_add(0, end, decay.exp())

        match self.edge_norm:
            case "none":
                return decay
            case "sqrt_in":
                return decay - 0.5 * degree(target).clamp(min=1).log()[target]
            case "sqrt_both":
                into = degree(target)
                return decay - 0.5 * (into[source] * into[target]).clamp(min=1).log()
            case "in":
                return decay - degree(target).clamp(min=1).log()[target]
            case "out" | "in_sum":
                end = source if self.edge_norm == "out" else target
                leak = (-rate * steps["leak"]).exp()
                return decay + math.log(self.gamma) - (sums(end) + leak).clamp(min=1).log()[end]
            case _:
                out, into = sums(source), sums(target)
                return decay + math.log(self.gamma) - 0.5 * (out[source] * into[target]).log()

    def _edge_steps(self, steps: dict[str, Tensor], edge: Tensor | None, source: Tensor, target: Tensor) -> Tensor:
        if self.edge_step == "target":
            step = steps["target"][target]
            return step if edge is None else step + edge
        parts = [steps["target"][target]]
        parts.append(steps["target" if self.edge_step == "symmetric" else "source"][source])
        if edge is not None:
            parts.append(_mean_of_both_ways(edge, source, target) if self.edge_step == "symmetric" else edge)
        total = torch.stack(parts).sum(0)
        return total / (math.sqrt(len(parts)) if self.edge_step == "rms" else len(parts))

    def _convolve(self, xBC: Tensor, graph: GraphTopology) -> Tensor:
        source, target = graph.edge_index
        if self.conv == "depthwise":
            neighbours = torch.zeros_like(xBC).index_add(0, target, xBC[source])
            return self.conv_self * xBC + self.conv_neighbours * neighbours
        if self.conv == "gcn":
            degree = 1 + torch.bincount(target, minlength=len(xBC)).to(xBC.dtype)[:, None]
            scaled = self.conv_proj(xBC) * degree.rsqrt()
            return (scaled + torch.zeros_like(scaled).index_add(0, target, scaled[source])) * degree.rsqrt()
        return xBC

    def _scan(self, scan: _Scan, graph: GraphTopology, direction: int) -> Tensor:
        """y before the skip, (v, h, p), by the cheapest operator for this kind of graph."""
        edges = graph.edges if direction == 0 else graph.reverse
        ends = graph.edge_index if direction == 0 else graph.edge_index.flip(0)
        arguments = (scan.values, scan.decay, scan.B, scan.C, ends)
        if graph.chains is not None:
            return self._scan_chains(scan, graph, direction)
        if graph.grid is not None and self._by_grid(scan.plain):
            return self._scan_grid(scan, graph.grid, direction)
        if edges.order is not None:
            return dag_scan(*arguments, edges.order)
        bound = self.gamma if self.edge_norm == "sym" else None  # sums of such weights may be above 1
        return graph_resolvent(*arguments, edges, method=self.method, spectral_bound=bound)

    def _by_grid(self, x: Tensor) -> bool:
        """Whether a grid is for the 2-D scan: a cell takes the mean of its two sides, each with the cell's own step.

        On a CPU the levels of a grid are faster; on a GPU one kernel is, where each level would be a launch.
        """
        mean = (self.edge_step, self.edge_norm, self.input_gain) == ("target", "in", "target_step")
        return x.is_cuda and mean and self.d_edge is None and self.ngroups == 1

    def _scan_grid(self, scan: _Scan, grid: tuple[int, int, int], direction: int) -> Tensor:
        """One 2-D scan of all grids from the first corner, or from the last one."""
        heads, headdim = scan.plain.shape[1:]
        steps = scan.gain.unflatten(0, grid).repeat_interleave(headdim, dim=-1)
        rate = -torch.ones_like(self.D) if self.A_log is None else -self.A_log[direction].exp()
        rates = rate.repeat_interleave(headdim)[:, None].expand(-1, self.d_state)
        B, C = (tensor[:, 0].unflatten(0, grid) for tensor in (scan.B, scan.C))
        x = scan.plain.flatten(1).unflatten(0, grid)
        y = grid_scan(x, steps, rates, B, C, steps, rates, B, flip=("i", "j") if direction else ())
        return y.flatten(0, 2).unflatten(-1, (heads, headdim))

    def _scan_chains(self, scan: _Scan, graph: GraphTopology, direction: int) -> Tensor:
        """One 1-D scan over all chains, laid in one line."""
        assert graph.chains is not None
        line, number = graph.chains
        target = graph.edge_index[1 - direction]
        decay = scan.values.new_zeros(len(line), self.nheads).index_copy(0, target, scan.decay.to(scan.values.dtype))
        if direction == 1:
            line, number = line.flip(0), number.max() - number.flip(0)
        x, log_decay, B, C = (tensor[line][None] for tensor in (scan.values, decay, scan.B, scan.C))
        y, _ = ssd(x, log_decay, B.to(x.dtype), C.to(x.dtype), seq_idx=number[None])
        return torch.empty_like(y[0]).index_copy(0, line, y[0])


@dataclass(frozen=True)
class _Scan:
    """What a direction's scan takes: values (v, h, p) with their gain, decays (e, h), B, C (v, g, n), gain (v, h), and
    values without gain."""

    values: Tensor
    decay: Tensor
    B: Tensor
    C: Tensor
    gain: Tensor
    plain: Tensor


def _mean_of_both_ways(edge: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Mean over all edges between the same two nodes, in either direction."""
    low, high = torch.minimum(source, target), torch.maximum(source, target)
    pair = torch.stack([low, high]).unique(dim=1, return_inverse=True)[1]
    count = torch.bincount(pair).to(edge.dtype)[:, None]
    return (edge.new_zeros(len(count), edge.shape[1]).index_add(0, pair, edge) / count)[pair]
