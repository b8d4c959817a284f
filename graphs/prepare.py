"""What is done to a graph before a model sees it: positions of its nodes, and directions of its edges."""

from __future__ import annotations

from dataclasses import replace

import torch

from .batch import Graph
from .encoders import depth_pe, random_walk_pe, sibling_pe
from .order import Orientation, orient


def prepare(
    graph: Graph,
    *,
    orientation: Orientation | None = None,
    pe_steps: int = 0,
    depth_steps: int = 0,
    sibling_steps: int = 0,
    seed: int = 0,
) -> Graph:
    """Orient a graph and add positional features: the random walks', then the depth's, then the places among siblings.

    Args:
        graph: One graph.
        orientation: Order by which an undirected graph becomes a DAG, see `rank_nodes`; a directed one stays.
        pe_steps: Length of the longest random walk, over the edges before they are oriented; 0: none.
        depth_steps: Columns of `depth_pe`, of the oriented graph; 0: none.
        sibling_steps: Columns of `sibling_pe`, of the oriented graph; 0: none.
        seed: Of the order "random".

    Raises:
        ValueError: if the depth is wanted of a graph with a cycle, or an odd number of columns for siblings.
    """
    walks = random_walk_pe(graph.edge_index, graph.num_nodes, pe_steps) if pe_steps else None
    graph = orient(graph, orientation, seed=seed) if orientation else graph
    depth = depth_pe(graph.edge_index, graph.num_nodes, depth_steps) if depth_steps else None
    places = sibling_pe(graph.edge_index, graph.num_nodes, sibling_steps) if sibling_steps else None
    found = [part for part in (walks, depth, places) if part is not None]
    return replace(graph, pe=torch.cat(found, dim=1)) if found else graph
