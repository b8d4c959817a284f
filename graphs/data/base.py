"""Base of the graph data modules: parts, what the graphs are, loaders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.utils.data import DataLoader, Dataset

from ...ssmcore.training import SSMData
from ..batch import Graph, GraphBatch, collate
from ..encoders import feature_schema
from ..order import Orientation
from ..prepare import prepare

Level = Literal["graph", "node", "link"]
Target = Literal["classes", "binary", "values"]
PartName = Literal["train", "val", "test"]


class GraphSet(Dataset):
    """Graphs of one part, by number."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self.graphs = graphs

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: int) -> Graph:
        """Graph `index`."""
        return self.graphs[index]


class GraphData(SSMData):
    """Base of the graph data modules; subclasses read the parts.

    Args:
        batch_size: Graphs per batch and process.
        num_workers: Processes that join graphs to batches.
        orientation: Turn undirected graphs into DAGs by an order of their nodes: "input", "bfs", "degree" or "random";
            None: leave them.
        pe_steps: Length of the longest random walk of the positional features; 0: none.
        depth_steps: Columns of positional features that tell the depth of a node of a DAG; 0: none.
        sibling_steps: Columns of positional features that tell a node's place among its siblings; 0: none.
        max_nodes: Leave out larger graphs.
        topology: Work out orders and sorted edges with each batch, as state-space layers need.
        clusters: Work out the clusters of nodes once for every graph, as models over hierarchical sequences need.
        seed: Of the order "random", and with the run's seed of the order of training.

    Raises:
        ValueError: if an option is out of range.
    """

    level: Level = "graph"
    target: Target = "classes"

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        orientation: Orientation | None = None,
        pe_steps: int = 0,
        depth_steps: int = 0,
        sibling_steps: int = 0,
        max_nodes: int | None = None,
        topology: bool = True,
        clusters: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        columns = {"pe_steps": pe_steps, "depth_steps": depth_steps, "sibling_steps": sibling_steps}
        if batch_size < 1 or min(columns.values()) < 0 or (max_nodes is not None and max_nodes < 1):
            raise ValueError(
                f"batch_size and max_nodes must be positive, {', '.join(columns)} not negative, got"
                f" {batch_size}, {max_nodes}, {', '.join(map(str, columns.values()))}."
            )
        if orientation is not None and orientation not in get_args(Orientation):
            raise ValueError(f"orientation must be one of {', '.join(get_args(Orientation))}, got {orientation!r}.")
        self.batch_size, self.num_workers, self.topology, self.clusters = batch_size, num_workers, topology, clusters
        self.preparation: dict[str, Any] = {"orientation": orientation, **columns, "seed": seed}
        self.max_nodes, self.seed = max_nodes, seed
        self._parts: dict[str, list[Graph]] = {}
        self._schema: dict[str, Any] = {}

    def read_parts(self) -> dict[str, list[Graph]]:
        """The graphs of "train", "val" and "test"; subclasses override this."""
        raise TypeError(f"{type(self).__name__} reads no data; use a subclass such as Packed.")

    def setup(self, stage: str | None = None) -> None:
        """Read all graphs."""
        if self._parts:
            return
        parts = {name: [self._prepared(graph) for graph in graphs] for name, graphs in self.read_parts().items()}
        if self.max_nodes is not None:
            most = self.max_nodes
            parts = {name: [graph for graph in graphs if graph.num_nodes <= most] for name, graphs in parts.items()}
        empty = [name for name, graphs in parts.items() if not graphs]
        if empty:
            raise ValueError(f"no graph is left in {', '.join(empty)}; raise max_nodes or give more graphs.")
        self._parts = parts

    def _prepared(self, graph: Graph) -> Graph:
        if self.max_nodes is not None and graph.num_nodes > self.max_nodes:
            return graph  # left out afterwards
        graph = prepare(graph, **self.preparation)
        return (
            replace(graph, clusters=collate([graph], topology=False).with_clusters().clusters)
            if self.clusters
            else graph
        )

    def graphs(self, part: PartName) -> list[Graph]:
        """Graphs of one part.

        Raises:
            ValueError: if there is no such part.
        """
        self.setup()
        if part not in self._parts:
            raise ValueError(f"These data have no part {part!r}, only {', '.join(self._parts)}.")
        return self._parts[part]

    @property
    def schema(self) -> dict[str, Any]:
        """What the graphs are, JSON-able: arguments of `GraphModel`, "target", and mean and scale of values."""
        self.setup()
        if not self._schema:
            self._schema = self._found_schema()
        return self._schema

    def _found_schema(self) -> dict[str, Any]:
        every = [graph for graphs in self._parts.values() for graph in graphs]
        found = {**feature_schema(every), "level": self.level, "target": self.target}
        labels = torch.cat([graph.y for graph in every if graph.y is not None])
        if self.target == "classes":
            found["num_outputs"] = int(labels.max()) + 1
            return found
        found["num_outputs"] = 1 if labels.dim() == 1 else labels.shape[1]
        if self.target == "values":
            train = torch.cat([graph.y for graph in self.graphs("train") if graph.y is not None]).double()
            train = train.view(len(train), -1)
            known = train.isfinite()
            count = known.sum(0).clamp(min=1)
            mean = train.where(known, 0.0).sum(0) / count
            scale = ((train - mean).where(known, 0.0).square().sum(0) / count).sqrt()
            found["mean"] = mean.tolist()
            found["scale"] = torch.where(scale > 0, scale, 1.0).tolist()
        return found

    def state(self) -> dict[str, Any]:
        """What a saved model must know of its data."""
        return {"schema": self.schema, **self.preparation}

    def train_dataloader(self) -> DataLoader[GraphBatch]:
        """Training graphs in a seeded random order."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[GraphBatch]:
        """Validation graphs in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[GraphBatch]:
        """Test graphs in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[GraphBatch]:
        """The test graphs."""
        return self.test_dataloader()

    def _loader(self, part: PartName, **options: Any) -> DataLoader[GraphBatch]:
        join = partial(collate, topology=self.topology)
        return self.create_loader(
            GraphSet(self.graphs(part)), self.batch_size, num_workers=self.num_workers, collate_fn=join, **options
        )
