"""Random graphs whose answer is known exactly: each asks for one thing that a model of graphs should be able to do.

path_sum            DAG with labelled edges; the sum over all paths from the marked sources to the sink of the product
                    of the labels' weights
reachability        DAG; can the node marked 2 be reached from the node marked 1
connectivity        undirected, two halves with a mark each; is there an edge between them
ring                undirected ring of 2 k nodes; the class of the node opposite
chain               directed path of k edges; the class of its first node at its last
listops             expression tree of min, max and sum modulo 10; its value at the root
color_connectivity  undirected grid of two colours; is the coloured part one piece or two
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..batch import Graph
from .base import Level, Target

Rng = np.random.Generator

PATH_WEIGHTS = (0.25, 0.5, 0.75, 1.0)
OPERATIONS: tuple[Callable[[list[int]], int], ...] = (min, max, lambda values: sum(values) % 10)


def path_sum(rng: Rng, nodes: int = 12, parents: int = 2) -> Graph:
    """Every node but the first two has `parents` edges from earlier ones; the last node is the only one asked."""
    source, target = [], []
    for node in range(2, nodes):
        for other in rng.choice(node, size=min(parents, node), replace=False):
            source.append(int(other))
            target.append(node)
    label = rng.integers(len(PATH_WEIGHTS), size=len(source))
    paths = np.zeros(nodes)
    paths[:2] = 1  # one walk of no edges at each source
    for u, v, k in zip(source, target, label):
        paths[v] += PATH_WEIGHTS[k] * paths[u]
    y = np.full((nodes, 1), np.nan, dtype=np.float32)
    y[-1] = paths[-1]
    return _graph((np.arange(nodes) < 2)[:, None], (source, target), y, edge_attr=label[:, None])


def reachability(rng: Rng, nodes: int = 16, parents: float = 1.5) -> Graph:
    """Random edges from lower to higher nodes; yes and no are equally likely."""
    wanted = bool(rng.integers(2))
    while True:
        ends = rng.integers(nodes, size=(2, round(nodes * parents)))
        ends = np.unique(np.sort(ends[:, ends[0] != ends[1]], axis=0), axis=1)
        start = int(rng.integers(nodes - 1))
        reached = {start}
        for u, v in ends[:, np.argsort(ends[0], kind="stable")].T.tolist():
            if u in reached:
                reached.add(v)
        others = [v for v in range(nodes) if v > start and (v in reached) == wanted]
        if others:
            break
    end = others[int(rng.integers(len(others)))]
    names = rng.permutation(nodes)
    x = np.zeros((nodes, 1), dtype=np.int64)
    x[names[start]], x[names[end]] = 1, 2
    y = np.full(nodes, -1)
    y[names[end]] = wanted
    return _graph(x, names[ends], y)


def connectivity(rng: Rng, nodes: int = 16) -> Graph:
    """Two random trees of half the nodes and three more edges; if connected, one of them joins the halves."""
    half = nodes // 2
    joined = bool(rng.integers(2))
    pairs: set[tuple[int, int]] = set()
    for first in (0, half):
        size = half if first == 0 else nodes - half
        pairs |= {(first + int(rng.integers(v)), first + v) for v in range(1, size)}
    while len(pairs) < nodes + 1:
        if joined and len(pairs) == nodes:
            u, v = int(rng.integers(half)), half + int(rng.integers(nodes - half))
        else:
            u, v = sorted(rng.choice(half, size=2, replace=False) + half * int(rng.integers(2)))
        pairs.add((int(u), int(v)))
    names = rng.permutation(nodes)
    x = np.zeros((nodes, 1), dtype=np.int64)
    x[names[int(rng.integers(half))]] = x[names[half + int(rng.integers(nodes - half))]] = 1
    ends = names[np.array(sorted(pairs)).T]
    return _graph(x, ends, np.array([int(joined)]), undirected=True)


def ring(rng: Rng, k: int = 8, classes: int = 4) -> Graph:
    """Node 0 has a class, node k is asked for it, the others are alike; names are shuffled."""
    nodes = 2 * k
    around = np.stack([np.arange(nodes), (np.arange(nodes) + 1) % nodes])
    return _transfer(rng, around, 0, k, nodes, classes, undirected=True)


def chain(rng: Rng, k: int = 64, classes: int = 4) -> Graph:
    """Node 0 has a class, the last node is asked for it."""
    path = np.stack([np.arange(k), np.arange(1, k + 1)])
    return _transfer(rng, path, 0, k, k + 1, classes, undirected=False)


def listops(rng: Rng, depth: int = 3, arity: int = 3) -> Graph:
    """Edges go from arguments to operations. Nodes 0 to 9 are digits, 10 min, 11 max, 12 the sum modulo 10."""
    x: list[int] = []
    source: list[int] = []
    target: list[int] = []

    def grow(left: int, parent: int | None) -> int:
        node = len(x)
        inner = left > 0 and (parent is None or rng.random() < 0.6)
        x.append(10 + int(rng.integers(3)) if inner else int(rng.integers(10)))
        if parent is not None:
            source.append(node)
            target.append(parent)
        if not inner:
            return x[node]
        values = [grow(left - 1, node) for _ in range(int(rng.integers(2, arity + 1)))]
        return OPERATIONS[x[node] - 10](values)

    value = grow(depth, None)
    y = np.full(len(x), -1)
    y[0] = value
    return _graph(np.array(x)[:, None], (source, target), y)


def color_connectivity(rng: Rng, side: int = 16, share: float = 0.2) -> Graph:
    """One random walk colours a share of the grid, or two that keep apart colour half of it each."""
    pieces = 1 + int(rng.integers(2))
    size = 2 * round(side * side * share / 2)  # even, so that counting cells tells nothing
    while True:
        color = np.zeros((side, side), dtype=np.int64)
        for piece in range(pieces):
            cell = rng.integers(side, size=2)
            found = {tuple(cell.tolist())}
            for _ in range(50 * size):
                if len(found) >= size // pieces:
                    break
                step = ((0, 1), (0, -1), (1, 0), (-1, 0))[int(rng.integers(4))]
                cell = np.clip(cell + step, 0, side - 1)
                found.add((int(cell[0]), int(cell[1])))
            for i, j in found:
                color[i, j] = piece + 1
        if _pieces(color > 0) == pieces:
            break
    cells = np.arange(side * side).reshape(side, side)
    across, down = np.stack([cells[:, :-1], cells[:, 1:]]), np.stack([cells[:-1], cells[1:]])
    ends = np.concatenate([across.reshape(2, -1), down.reshape(2, -1)], axis=1)
    return _graph((color > 0).reshape(-1, 1), ends, np.array([int(pieces == 1)]), undirected=True)


# Name -> how to draw one graph, and level and target of its `y`.
KINDS: dict[str, tuple[Callable[..., Graph], Level, Target]] = {
    "path_sum": (path_sum, "node", "values"),
    "reachability": (reachability, "node", "classes"),
    "connectivity": (connectivity, "graph", "classes"),
    "ring": (ring, "node", "classes"),
    "chain": (chain, "node", "classes"),
    "listops": (listops, "node", "classes"),
    "color_connectivity": (color_connectivity, "graph", "classes"),
}


def create_graphs(kind: str, count: int, seed: int = 0, **options: Any) -> list[Graph]:
    """Random graphs of one kind, the same for the same seed.

    Args:
        kind: One of `KINDS`.
        count: Number of graphs.
        seed: Of all of them.
        **options: Of the kind, such as `k` of "ring".

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    rng = np.random.default_rng(seed)
    return [KINDS[kind][0](rng, **options) for _ in range(count)]


def _transfer(rng: Rng, ends: np.ndarray, start: int, end: int, nodes: int, classes: int, *, undirected: bool) -> Graph:
    names = rng.permutation(nodes)
    kind = int(rng.integers(classes))
    x = np.zeros((nodes, 1), dtype=np.int64)
    x[names[start]], x[names[end]] = 2 + kind, 1
    y = np.full(nodes, -1)
    y[names[end]] = kind
    return _graph(x, names[ends], y, undirected=undirected)


def _pieces(inside: np.ndarray) -> int:
    """Number of connected parts of the cells that are set."""
    left = set(zip(*(axis.tolist() for axis in inside.nonzero())))
    count = 0
    while left:
        count += 1
        stack = [left.pop()]
        while stack:
            i, j = stack.pop()
            for other in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if other in left:
                    left.remove(other)
                    stack.append(other)
    return count


def _graph(x: Any, ends: Any, y: np.ndarray, edge_attr: Any = None, undirected: bool = False) -> Graph:
    edge_index = torch.from_numpy(np.asarray(ends, dtype=np.int64).reshape(2, -1))
    features = None if edge_attr is None else torch.from_numpy(np.asarray(edge_attr, dtype=np.int64))
    if undirected:
        edge_index = torch.cat([edge_index, edge_index.flip(0)], dim=1)
    target = torch.from_numpy(y if y.dtype == np.float32 else y.astype(np.int64))
    return Graph(
        torch.from_numpy(np.asarray(x, dtype=np.int64)), edge_index, features, target, is_directed=not undirected
    )
