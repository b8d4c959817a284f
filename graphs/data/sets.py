"""Data modules: packed files, synthetic sets, one large graph, and the long-range and ZINC sets as PyG stores them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...ssmcore.training.arrays import read_arrays
from ..batch import Graph
from .base import GraphData, Level, Target
from .packed import read_packed
from .processed import read_processed
from .synthetic import KINDS, create_graphs

Kind = Literal["path_sum", "reachability", "connectivity", "ring", "chain", "listops", "color_connectivity"]


class SyntheticGraphs(GraphData):
    """Random graphs with exact answers, see `omnissm.graphs.data.synthetic`.

    Args:
        kind: "path_sum", "reachability", "connectivity", "ring", "chain", "listops" or "color_connectivity".
        kind_args: Options of the kind, such as {k: 16} of "ring".
        train_samples: Training graphs.
        val_samples: Validation graphs; as many are for the test.
        **options: Of `GraphData`.
    """

    def __init__(
        self,
        kind: Kind = "path_sum",
        kind_args: dict[str, Any] | None = None,
        train_samples: int = 1024,
        val_samples: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        if min(train_samples, val_samples) < 1:
            raise ValueError(f"train_samples and val_samples must be positive, got {train_samples}, {val_samples}.")
        self.kind, self.kind_args = kind, kind_args or {}
        self.samples = {"train": train_samples, "val": val_samples, "test": val_samples}
        _, self.level, self.target = KINDS[kind]

    def read_parts(self) -> dict[str, list[Graph]]:
        """Draw the graphs; parts have seeds of their own."""
        return {
            part: create_graphs(self.kind, count, seed=3 * self.seed + k, **self.kind_args)
            for k, (part, count) in enumerate(self.samples.items())
        }


class Packed(GraphData):
    """Graphs of a packed file, see `omnissm.graphs.data.packed`.

    Args:
        path: The .npz file.
        target: What `y` holds: "classes" (one of several), "binary" (yes or no, one or several) or "values".
        level: What `y` belongs to: "graph" or "node".
        node_columns: Which columns of node features to use; None: all.
        **options: Of `GraphData`.
    """

    def __init__(
        self,
        path: str,
        target: Target = "values",
        level: Literal["graph", "node"] = "graph",
        node_columns: list[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path, self.target, self.level, self.node_columns = path, target, level, node_columns

    def read_parts(self) -> dict[str, list[Graph]]:
        """Read the file."""
        graphs, split = read_packed(self.path)
        parts: dict[str, list[Graph]] = {"train": [], "val": [], "test": []}
        width = graphs[0].x.shape[1] if graphs else 0
        wrong = [column for column in self.node_columns or [] if not 0 <= column < width]
        if wrong:
            raise ValueError(f"node_columns names column {wrong[0]}, {self.path!r} has columns 0 to {width - 1}.")
        for graph, part in zip(graphs, split):
            x = graph.x if self.node_columns is None else graph.x[:, self.node_columns]
            y = graph.y
            if self.target == "classes" and y is not None:
                y = y.nan_to_num(nan=-1).long()
                y = y[:, 0] if y.dim() == 2 else y
            parts[part].append(replace(graph, x=x, y=y))
        return {part: found for part, found in parts.items() if found}


class Cora(GraphData):
    """One graph of papers and citations with the Planetoid split: every part is the whole graph, and knows its labels.

    Args:
        path: `cora.npz`: edge_index, x_indptr and x_indices (sparse binary features), num_features, y, split.
        **options: Of `GraphData`.

    Source: McCallum, Nigam, Rennie & Seymore (2000); Yang, Cohen & Salakhutdinov (2016).
    """

    level = "node"
    target: Target = "classes"

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__(**options)
        self.path = path

    def read_parts(self) -> dict[str, list[Graph]]:
        """Read the file."""
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"{self.path!r} does not exist; expected cora.npz.")
        arrays = read_arrays(self.path)
        try:
            return _citations(arrays)
        except (ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
            raise ValueError(f"the arrays of {self.path!r} do not fit together: {error!r}.") from error


class _Prepared(GraphData):
    """Graphs of the three files in `folder`/processed."""

    folder: str = ""

    def read_parts(self) -> dict[str, list[Graph]]:
        """Read the three files."""
        return {
            part: [self._typed(graph) for graph in read_processed(Path(self.folder) / "processed" / f"{part}.pt")]
            for part in ("train", "val", "test")
        }

    def _typed(self, graph: Graph) -> Graph:
        if graph.y is None:
            raise ValueError(f"a graph in {self.folder!r} has no `y`.")
        y = graph.y.long() if self.target == "classes" else graph.y.float()
        return replace(graph, y=y)


class ProcessedSet(_Prepared):
    """Graphs that PyTorch Geometric has prepared: FOLDER/processed/train.pt, val.pt and test.pt.

    Args:
        folder: The folder above `processed`.
        target: What `y` holds: "classes", "binary" or "values".
        level: What `y` belongs to: "graph", "node" or "link".
        **options: Of `GraphData`.
    """

    def __init__(self, folder: str, target: Target = "values", level: Level = "graph", **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.target, self.level = folder, target, level


class LRGB(_Prepared):
    """A set of the Long Range Graph Benchmark, prepared by `LRGBDataset(root=ROOT, name=NAME, split=...)` of PyG.

    Args:
        name: "peptides-func", "peptides-struct", "pascalvoc-sp", "coco-sp" or "pcqm-contact".
        root: The folder that holds NAME/processed.
        **options: Of `GraphData`.

    Source: Dwivedi, Rampasek, Galkin, Parviz, Wolf, Luu & Beaini (2022).
    """

    def __init__(
        self,
        name: Literal["peptides-func", "peptides-struct", "pascalvoc-sp", "coco-sp", "pcqm-contact"],
        root: str = "data/lrgb",
        **options: Any,
    ) -> None:
        kinds: dict[str, tuple[Target, Level]] = {
            "peptides-func": ("binary", "graph"),
            "peptides-struct": ("values", "graph"),
            "pascalvoc-sp": ("classes", "node"),
            "coco-sp": ("classes", "node"),
            "pcqm-contact": ("binary", "link"),
        }
        if name not in kinds:
            raise ValueError(f"name must be one of {', '.join(kinds)}, got {name!r}.")
        super().__init__(**options)
        self.folder = str(Path(root) / name)
        self.target, self.level = kinds[name]


class ZINC(_Prepared):
    """Constrained solubility of molecules, prepared by `ZINC(root=ROOT, subset=True, split=...)` of PyG.

    Args:
        root: The folder that holds `subset/processed` or `full/processed`.
        subset: The 12,000 graphs of the benchmark instead of all 250,000.
        **options: Of `GraphData`.

    Source: Dwivedi, Joshi, Luu, Laurent, Bengio & Bresson (2020).
    """

    def __init__(self, root: str = "data/zinc", subset: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.target = str(Path(root) / ("subset" if subset else "full")), "values"


def _citations(arrays: dict[str, Any]) -> dict[str, list[Graph]]:
    """One graph three times, each with the labels of its part."""
    if arrays["x_indices"].min(initial=0) < 0:
        raise ValueError("`x_indices` names a word below 0")
    counts = np.diff(arrays["x_indptr"].astype(np.int64))
    if counts.min(initial=0) < 0 or counts.sum() != len(arrays["x_indices"]):
        raise ValueError(f"`x_indptr` does not cut the {len(arrays['x_indices'])} `x_indices` into rows")
    x = torch.zeros(len(counts), int(arrays["num_features"]))
    x[np.repeat(np.arange(len(counts)), counts), arrays["x_indices"].astype(np.int64)] = 1
    ends = torch.from_numpy(arrays["edge_index"].astype(np.int64))
    ends = torch.cat([ends, ends.flip(0)], dim=1)
    y, split = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("y", "split"))
    rows = x / x.sum(1, keepdim=True).clamp(min=1)
    return {
        part: [Graph(rows, ends, y=torch.where(split == k, y, -1), is_directed=False)]
        for k, part in enumerate(("train", "val", "test"))
    }
