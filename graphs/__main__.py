"""`omnissm graphs VERB`: the verbs that need no trainer, as plain typed functions; also `python -m`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

Kind = Literal["path_sum", "reachability", "connectivity", "ring", "chain", "listops", "color_connectivity"]
Orientation = Literal["input", "bfs", "degree", "random"]


def describe(data: Path) -> None:
    """Sizes, depth, cycles and labels of a packed file of graphs.

    Args:
        data: Packed file, .npz.

    Raises:
        ValueError: if it is no such file; the line says what is wrong.

    Example:
      omnissm graphs describe --data molecules.npz
    """
    import torch

    from ..ssmcore.mixers import graph_topology
    from .data.packed import read_packed

    graphs, split = read_packed(data)
    if not graphs:
        raise ValueError(f"{str(data)!r} holds no graph.")
    write = sys.stdout.write
    counts = ", ".join(f"{split.count(part)} {part}" for part in ("train", "val", "test"))
    directed = "directed" if graphs and graphs[0].is_directed else "undirected"
    write(f"{data}: {len(graphs)} {directed} graphs: {counts}\n")
    rows: list[tuple[str, list[int]]] = [
        ("nodes", [graph.num_nodes for graph in graphs]),
        ("edges", [graph.num_edges for graph in graphs]),
    ]
    orders = [graph_topology(graph.edge_index, graph.num_nodes).edges.order for graph in graphs]
    levels = [order.num_levels for order in orders if order is not None]
    if len(levels) == len(graphs):
        rows.append(("levels", levels))
    for name, values in rows:
        write(f"  {name:9} {min(values)} to {max(values)}, mean {sum(values) / len(values):.1f}\n")
    kinds = [order.kind if order is not None else "with cycles" for order in orders]
    write("  kinds     " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) + "\n")
    for name in ("x", "edge_attr", "y"):
        tensors = [tensor for graph in graphs if (tensor := getattr(graph, name)) is not None]
        if not tensors:
            continue
        whole = torch.cat(tensors).float()
        whole = whole[:, None] if whole.dim() == 1 else whole
        known = whole[whole.isfinite()]
        span = f"{known.min():g} to {known.max():g}" if len(known) else "all unknown" if len(whole) else "none"
        missing = 1 - len(known) / max(whole.numel(), 1)
        unknown = f", {missing:.1%} unknown" if missing else ""
        write(f"  {name:10}{whole.shape[1]} columns of {str(tensors[0].dtype)[6:]}, {span}{unknown}\n")


def plot(
    data: Path | None = None,
    synthetic: Kind | None = None,
    graph: int = 0,
    orientation: Orientation | None = None,
    checkpoint: Path | None = None,
    model: str | None = None,
    layer: int = 0,
    node: int | None = None,
    out: str = "graph.png",
) -> None:
    """Draw a graph by topological levels and, with a model, the influence between its nodes in one layer.

    Args:
        data: Packed file, .npz, to take the graph from.
        synthetic: Instead, a kind of random graph.
        graph: Number of the graph.
        orientation: Turn an undirected graph into a DAG by this order of its nodes; a trained model's own by default.
        checkpoint: Model folder, run folder or .ckpt file of a state-space model.
        model: Instead, the name of an untrained model.
        layer: Number of the state-space layer.
        node: Whose inputs are shown as colours; left out, the node that others influence most.
        out: Picture: .png, .pdf or .svg.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there is no such graph, or the model does not fit it.

    Example:
      omnissm graphs plot --synthetic listops --model dag_ssm_tiny --out influence.png
    """
    from . import plots
    from .prepare import prepare

    if Path(out).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"got the name {out!r}, expected one ending in .png, .pdf, .svg.")
    if checkpoint is not None and model is not None:
        raise ValueError("give either --checkpoint or --model, not both.")
    chosen = _graph(data, synthetic, graph)
    net: Any = None
    prepared: dict[str, Any] = {}
    if checkpoint is not None:
        from .checkpoint import load

        trained = load(checkpoint)
        net, prepared, model = trained.net, trained.data, trained.name
    orientation = orientation or prepared.get("orientation")
    chosen = prepare(
        chosen,
        orientation=None if chosen.is_directed else orientation,
        **{name: prepared[name] for name in ("pe_steps", "depth_steps", "sibling_steps", "seed") if name in prepared},
    )
    source = str(synthetic or (data.name if data else ""))
    depth = int(plots.node_levels(chosen).max()) + 1 if chosen.num_nodes else 0
    columns = f"{depth} level{'s' * (depth != 1)}" if plots.acyclic(chosen) else "by distance from the first"
    title = f"{source}, graph {graph}: {chosen.num_nodes} nodes, {columns}"
    if net is None and model is not None:
        net = _untrained(model, chosen)
    matrix = None if net is None else plots.influence(net, chosen, layer)
    if model is not None:
        title = f"{model}, layer {layer}; {title}"
    sys.stdout.write(f"{plots.save(plots.draw(chosen, title, matrix, node), out)}\n")


def list_names(pattern: str = "*") -> None:
    """Names of the models, and what they are.

    Args:
        pattern: Shell pattern, such as dag_*.

    Example:
      omnissm graphs list --pattern 'dag_*'
    """
    from .models import MODELS, create_model, list_models

    found = list_models(pattern)
    if not found:
        raise ValueError(f"no model's name is like {pattern!r}; `omnissm graphs list` shows all.")
    for name in found:
        count = sum(p.numel() for p in create_model(name, node_vocab=[1]).parameters())
        sys.stdout.write(f"{name:22} {count:12,} {MODELS[name].about}\n")


def _graph(data: Path | None, synthetic: str | None, number: int) -> Any:
    if (data is None) == (synthetic is None):
        raise ValueError("give either --data or --synthetic, to say where the graph comes from.")
    if synthetic is not None:
        from .data.synthetic import create_graphs

        if number < 0:
            raise ValueError(f"graph {number} is not there; graphs are counted from 0.")
        return create_graphs(synthetic, number + 1)[number]
    from .data.packed import read_packed

    graphs, _ = read_packed(str(data))
    if not 0 <= number < len(graphs):
        raise ValueError(f"graph {number} is not there; {str(data)!r} has {len(graphs)}.")
    return graphs[number]


def _untrained(name: str, graph: Any) -> Any:
    import torch

    from .encoders import feature_schema
    from .models import create_model

    torch.manual_seed(0)
    return create_model(name, **feature_schema([graph])).eval()


if __name__ == "__main__":
    from ..__main__ import main

    sys.exit(main(["graphs", *sys.argv[1:]]))
