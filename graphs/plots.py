"""Pictures of a graph: its nodes by topological level, and how much each node weighs in each other's output.

Needs matplotlib (`pip install "omnissm[plot]"`).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import dag_order
from ..ssmcore.mixers import graph_topology
from ..ssmcore.training.checkpoints import write_atomic
from .batch import Graph, collate
from .models.ensemble import GraphEnsemble
from .models.graph_model import GraphModel
from .models.layers import SSMLayer
from .order import rank_nodes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["acyclic", "draw", "influence", "layout", "node_levels", "save"]


def acyclic(graph: Graph) -> bool:
    """Whether a graph has no cycle; edges in both directions are one."""
    return graph_topology(graph.edge_index, graph.num_nodes).acyclic


def node_levels(graph: Graph) -> Tensor:
    """Level of each node, (v,): the longest path into it; with cycles its distance from its component's first node."""
    if not acyclic(graph):
        return _distances(graph)
    order = dag_order(graph.edge_index, graph.num_nodes)
    level = torch.repeat_interleave(torch.arange(order.num_levels), order.level_ptr.diff())
    return level[order.inverse]


def _distances(graph: Graph) -> Tensor:
    both = torch.cat([graph.edge_index, graph.edge_index.flip(0)], dim=1)
    order = torch.argsort(rank_nodes(both, graph.num_nodes, "bfs"))
    level = torch.full((graph.num_nodes,), -1)
    for node in order.tolist():
        before = level[both[0, both[1] == node]]
        before = before[before >= 0]
        level[node] = before.min() + 1 if len(before) else 0
    return level


def influence(net: GraphModel | GraphEnsemble, graph: Graph, layer: int = 0) -> Tensor:
    """Size of a layer's mixing matrix for one graph, mean over heads, (v, v): row output, column input.

    Of an ensemble it is the first member's.

    Raises:
        ValueError: if the model has no such state-space layer.
    """
    net = net.first if isinstance(net, GraphEnsemble) else net
    mixers = [made.mixer for made in net.layers if isinstance(made, SSMLayer) and made.mixer is not None]
    if not -len(mixers) <= layer < len(mixers):
        raise ValueError(f"layer {layer} is not there; the model has {len(mixers)} state-space layers.")
    mixer = mixers[layer]
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = mixer.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True)
    try:
        with torch.no_grad():
            net.eval().features(collate([graph]))
    finally:
        handle.remove()
    arguments, options = seen[0]
    with torch.no_grad():
        return mixer.mixing_matrix(*arguments, **options).abs().mean(0)


def layout(graph: Graph) -> np.ndarray:
    """Places of the nodes, (v, 2): columns by level; within one, near the mean height of their neighbours before."""
    level = node_levels(graph)
    place = np.zeros((graph.num_nodes, 2))
    place[:, 0] = level.numpy()
    before: list[list[int]] = [[] for _ in range(graph.num_nodes)]
    for u, v in graph.edge_index.t().tolist():
        for one, other in ((u, v), (v, u)):
            if level[one] < level[other]:
                before[other].append(one)
    for k in range(int(level.max()) + 1 if graph.num_nodes else 0):
        nodes = (level == k).nonzero()[:, 0].tolist()
        nodes.sort(key=lambda v: (np.mean([place[u, 1] for u in before[v]]) if before[v] else 0.0, v))
        for i, v in enumerate(nodes):
            place[v, 1] = i - (len(nodes) - 1) / 2
    return place


def draw(graph: Graph, title: str, matrix: Tensor | None = None, node: int | None = None) -> Figure:
    """Nodes and edges by level; with a matrix also how much each node weighs in the output of one, and the matrix.

    Args:
        graph: What to draw.
        title: Above it.
        matrix: Of `influence`, (v, v).
        node: Whose inputs are shown as colours; None: the node in whose output others weigh most.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there is no such node or no node at all.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "omnissm[plot]"') from error
    if graph.num_nodes == 0:
        raise ValueError("the graph has no node to draw.")
    if node is not None and not 0 <= node < graph.num_nodes:
        raise ValueError(f"node {node} is not there; the graph has {graph.num_nodes} nodes.")
    figure = Canvas(figsize=(6.4 if matrix is None else 11.0, 4.6), layout="constrained")
    panels: Any = figure.subplots(
        1, 1 if matrix is None else 2, squeeze=False, width_ratios=[1.3, 1][: 1 + (matrix is not None)]
    )
    axes = panels[0, 0]
    place, level = layout(graph), node_levels(graph)
    share: Any = level.numpy()
    label, most = "level" if acyclic(graph) else "distance", None
    if matrix is not None:
        others = matrix - torch.diag(matrix.diagonal())
        shown = int(others.sum(1).argmax()) if node is None else node
        share, label = np.sqrt(matrix[shown].numpy()), f"weight in the output of node {shown}, square root"
        most = float(others.max().sqrt()) or None  # a node's own weight is far above: it would hide the others
        axes.scatter(*place[shown], s=240, facecolors="none", edgecolors="#c8553d", linewidths=2, zorder=3)
    _draw_edges(axes, graph, place)
    size = max(12.0, min(110.0, 9000 / max(graph.num_nodes, 1)))
    points = axes.scatter(
        place[:, 0], place[:, 1], c=share, s=size, vmax=most, cmap="viridis", edgecolors="white", zorder=2
    )
    extend = "neither" if matrix is None else "max"
    figure.colorbar(points, ax=axes, label=label, location="bottom", shrink=0.7, aspect=40, extend=extend)
    if graph.num_nodes <= 40:
        for v, (x, y) in enumerate(place):
            axes.annotate(str(v), (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=7)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_axis_off()
    axes.margins(0.06)
    if matrix is not None:
        right = panels[0, 1]
        order = np.lexsort((place[:, 1], place[:, 0]))
        sizes = np.sqrt(matrix.numpy()[np.ix_(order, order)])
        picture = right.imshow(sizes, vmin=0, vmax=most, cmap="magma", interpolation="nearest")
        right.set_title(f"influence, nodes by {'level' if acyclic(graph) else 'distance'}", loc="left", fontsize=10)
        right.set_xlabel("input node")
        right.set_ylabel("output node")
        if graph.num_nodes <= 40:
            right.set_xticks(range(len(order)), order, fontsize=6, rotation=90)
            right.set_yticks(range(len(order)), order, fontsize=6)
        figure.colorbar(picture, ax=right, label="square root of the weight", shrink=0.8, extend="max")
    return figure


def _draw_edges(axes: Any, graph: Graph, place: np.ndarray) -> None:
    for u, v in graph.edge_index.t().tolist():
        if not graph.is_directed and u > v:
            continue
        style = {"arrowstyle": "-|>" if graph.is_directed else "-", "color": "#9aa5b1", "lw": 0.8, "shrinkA": 4}
        bend = 0.0 if abs(place[u, 0] - place[v, 0]) == 1 else 0.18  # around the nodes between
        style |= {"shrinkB": 4, "connectionstyle": f"arc3,rad={bend}"}
        axes.annotate("", place[v], xytext=place[u], arrowprops=style, zorder=1)


def save(figure: Figure, out: str | Path) -> Path:
    """Write a figure whole or not at all; the suffix is the format."""
    path, buffer = Path(out), io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".").lower(), dpi=150, bbox_inches="tight")
    write_atomic(path, buffer.getvalue())
    return path
