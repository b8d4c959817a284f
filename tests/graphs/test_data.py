"""Packed files, synthetic sets against other ways to the same answer, PyG's files, and the data modules."""

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from omnissm.graphs import Graph
from omnissm.graphs.data import (
    LRGB,
    ZINC,
    Cora,
    Packed,
    SyntheticGraphs,
    create_graphs,
    read_packed,
    read_processed,
    write_packed,
)
from omnissm.graphs.data.synthetic import KINDS, PATH_WEIGHTS


def reached(graph, start):
    """Nodes that can be reached, by powers of the adjacency matrix."""
    hit = torch.zeros(graph.num_nodes)
    hit[start] = 1
    matrix = torch.zeros(graph.num_nodes, graph.num_nodes)
    matrix[graph.edge_index[1], graph.edge_index[0]] = 1
    for _ in range(graph.num_nodes):
        hit = ((hit + matrix @ hit) > 0).float()
    return hit > 0


def marked(graph, value):
    return int((graph.x[:, 0] == value).nonzero()[0, 0])


def test_path_sum_is_the_resolvent():
    for graph in create_graphs("path_sum", 20):
        matrix = torch.zeros(12, 12, dtype=torch.float64)
        weights = torch.tensor(PATH_WEIGHTS, dtype=torch.float64)[graph.edge_attr[:, 0]]
        matrix.index_put_((graph.edge_index[1], graph.edge_index[0]), weights, accumulate=True)
        total = torch.linalg.inv(torch.eye(12, dtype=torch.float64) - matrix) @ graph.x.double()
        torch.testing.assert_close(graph.y[-1].double(), total[-1], rtol=1e-6, atol=0)
        assert graph.y[:-1].isnan().all()


def test_reachability_and_connectivity_by_powers():
    graphs = create_graphs("reachability", 60)
    answers = []
    for graph in graphs:
        end = marked(graph, 2)
        answers.append(int(graph.y[end]))
        assert bool(reached(graph, marked(graph, 1))[end]) == answers[-1]
        assert (graph.y >= 0).sum() == 1
    assert 15 < sum(answers) < 45
    for graph in create_graphs("connectivity", 60):
        start, end = (graph.x[:, 0] == 1).nonzero()[:, 0].tolist()
        assert bool(reached(graph, start)[end]) == int(graph.y)
        assert reached(graph, start).sum() == (graph.num_nodes if graph.y else graph.num_nodes // 2)
        assert graph.num_edges == 2 * (graph.num_nodes + 1)  # the number of edges tells nothing


@pytest.mark.parametrize(("kind", "k"), [("ring", 5), ("chain", 7)])
def test_transfer_is_over_k_edges(kind, k):
    for graph in create_graphs(kind, 10, k=k):
        start, end = int(graph.x[:, 0].argmax()), marked(graph, 1)
        assert graph.y[end] == graph.x[start, 0] - 2
        matrix = torch.zeros(graph.num_nodes, graph.num_nodes)
        matrix[graph.edge_index[1], graph.edge_index[0]] = 1
        ways = [torch.linalg.matrix_power(matrix, n)[end, start] for n in range(k + 1)]
        assert not any(ways[:k])
        assert ways[k] == (2 if kind == "ring" else 1)


def tree_value(graph, node):
    """Value and depth of the tree below a node."""
    operations = {10: min, 11: max, 12: lambda values: sum(values) % 10}
    children = graph.edge_index[0, graph.edge_index[1] == node].tolist()
    if not children:
        return int(graph.x[node]), 0
    values, depths = zip(*(tree_value(graph, child) for child in children))
    return operations[int(graph.x[node])](values), 1 + max(depths)


def test_listops_by_recursion():
    found = [(tree_value(graph, 0), int(graph.y[0])) for graph in create_graphs("listops", 30, depth=3)]
    assert all(value == y for (value, _), y in found)
    assert max(depth for (_, depth), _ in found) == 3
    assert len({y for _, y in found}) > 5


def test_color_connectivity_by_components():
    graphs = create_graphs("color_connectivity", 12, side=10)
    assert {int(graph.y) for graph in graphs} == {0, 1}
    sizes = {int(graph.x.sum()) for graph in graphs}
    assert len(sizes) == 1  # counting cells tells nothing
    for graph in graphs:
        color = graph.x[:, 0].bool()
        inner = color[graph.edge_index].all(0)
        part = replace(graph, edge_index=graph.edge_index[:, inner], y=None)
        first = int(color.nonzero()[0, 0])
        assert torch.equal(reached(part, first), color) == bool(graph.y)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_loaders(kind):
    data = SyntheticGraphs(kind, train_samples=6, val_samples=4, batch_size=4)
    first = data.graphs("train")
    again = SyntheticGraphs(kind, train_samples=6, val_samples=4).graphs("train")
    assert all(torch.equal(a.x, b.x) and torch.equal(a.edge_index, b.edge_index) for a, b in zip(first, again))
    other = create_graphs(kind, 6, seed=1)
    pairs = list(zip(first, other))
    assert any(a.x.shape != b.x.shape or not torch.equal(a.x, b.x) for a, b in pairs) or any(
        not torch.equal(a.edge_index, b.edge_index) for a, b in pairs
    )
    sizes = [batch.num_graphs for batch in data.train_dataloader()]
    assert sizes == [4, 2]
    assert next(iter(data.val_dataloader())).topology is not None
    assert data.schema["level"] == data.level
    with pytest.raises(ValueError, match="no part 'dev'"):
        data.graphs("dev")


def test_packed_round_trip(tmp_path):
    graphs = [replace(graph, y=torch.tensor([[1.0, float("nan")]])) for graph in create_graphs("ring", 4, k=3)]
    path = tmp_path / "rings.npz"
    write_packed(path, graphs, ["train", "train", "val", "test"])
    back, split = read_packed(path)
    assert split == ["train", "train", "val", "test"]
    for one, other in zip(graphs, back, strict=True):
        assert torch.equal(one.x, other.x)
        assert not other.is_directed
        assert {*zip(*one.edge_index.tolist())} == {*zip(*other.edge_index.tolist())}
        torch.testing.assert_close(one.y, other.y, equal_nan=True)
    data = Packed(str(path), target="binary", orientation="bfs", pe_steps=3, depth_steps=2, batch_size=2)
    assert data.schema["pe"] == 5
    batch = next(iter(data.train_dataloader()))
    assert batch.is_directed
    assert batch.topology.acyclic
    assert batch.pe.shape == (12, 5)
    with pytest.raises(ValueError, match="no graph is left in train"):
        Packed(str(path), max_nodes=2).setup()


def test_a_self_loop_of_a_packed_file_stays_one(tmp_path):
    ends = torch.tensor([[0, 1, 2], [1, 0, 2]])
    features, y = torch.tensor([[5.0], [5.0], [7.0]]), torch.zeros(1, 1)
    graph = Graph(torch.zeros(3, 1), ends, features, y=y, is_directed=False)
    for _ in range(2):
        write_packed(tmp_path / "a.npz", [graph], ["train"])
        ((graph,), _) = read_packed(tmp_path / "a.npz")
        found = zip(*graph.edge_index.tolist(), graph.edge_attr[:, 0].tolist())
        assert sorted(found) == [(0, 1, 5.0), (1, 0, 5.0), (2, 2, 7.0)]


def test_values_that_are_not_finite_are_unknown_to_the_schema(tmp_path):
    graphs = create_graphs("ring", 5, k=3)
    labels = [1.0, float("inf"), 5.0, float("nan"), 9.0]
    graphs = [replace(graph, y=torch.tensor([[label]])) for graph, label in zip(graphs, labels)]
    write_packed(tmp_path / "a.npz", graphs, ["train"] * 4 + ["test"])
    schema = Packed(str(tmp_path / "a.npz")).schema
    assert (schema["mean"], schema["scale"]) == ([3.0], [2.0])
    write_packed(tmp_path / "b.npz", graphs, ["test"] * 5)
    with pytest.raises(ValueError, match="no part 'train', only test"):
        _ = Packed(str(tmp_path / "b.npz")).schema


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "lacks x"),
        ({"node_ptr": np.array([0, 3, 9])}, "`node_ptr`"),
        ({"edge_index": np.zeros((3, 4), dtype=np.int16)}, "`edge_index`"),
        ({"edge_index": np.full((2, 4), 7, dtype=np.int16)}, "names node 7"),
        ({"split": np.array([0, 3])}, "`split`"),
        ({"y": np.zeros((5, 1), dtype=np.float32)}, "`y`"),
    ],
)
def test_damaged_packed_files(tmp_path, change, message):
    arrays = {
        "node_ptr": np.array([0, 2, 4]),
        "edge_ptr": np.array([0, 2, 4]),
        "x": np.zeros((4, 1), dtype=np.uint8),
        "edge_index": np.array([[0, 0, 0, 0], [1, 1, 1, 1]], dtype=np.int16),
        "y": np.zeros((2, 1), dtype=np.float32),
        "split": np.array([0, 2], dtype=np.uint8),
    } | change
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message):
        read_packed(tmp_path / "a.npz")


def test_files_that_are_no_packed_graphs(tmp_path):
    with pytest.raises(FileNotFoundError, match="packed file of graphs"):
        read_packed(tmp_path / "gone.npz")
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(ValueError, match=r"no readable \.npz"):
        read_packed(tmp_path / "text.npz")


@pytest.fixture
def stored(monkeypatch):
    """Writes graphs as PyG's `InMemoryDataset.save` does, with a class of PyG's name."""
    module = ModuleType("torch_geometric.data.data")
    kind = type("Data", (), {"__module__": "torch_geometric.data.data"})
    module.Data = kind
    for name in ("torch_geometric", "torch_geometric.data"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torch_geometric.data.data", module)

    def write(path, graphs):
        parts, slices = {}, {}
        for name in ("x", "edge_index", "edge_attr", "y"):
            tensors = [getattr(graph, name) for graph in graphs]
            dim = 1 if name == "edge_index" else 0
            parts[name] = torch.cat(tensors, dim=dim)
            slices[name] = torch.tensor([0, *np.cumsum([t.shape[dim] for t in tensors])])
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((parts, slices, kind), path)

    return write


def molecules(count, labels):
    return [
        Graph(
            torch.tensor([[k], [1], [2]]),
            torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]),
            torch.tensor([[0], [0], [1], [1]]),
            torch.full((1, labels), float(k)),
            is_directed=False,
        )
        for k in range(count)
    ]


def test_files_of_pyg_without_pyg(tmp_path, stored):
    for part in ("train", "val", "test"):
        stored(tmp_path / "peptides-func" / "processed" / f"{part}.pt", molecules(3, 10))
        stored(tmp_path / "subset" / "processed" / f"{part}.pt", molecules(2, 1))
    data = LRGB("peptides-func", str(tmp_path), batch_size=2)
    assert data.schema == {
        "node_vocab": [3],
        "node_features": 0,
        "edge_vocab": [2],
        "edge_features": 0,
        "pe": 0,
        "level": "graph",
        "target": "binary",
        "num_outputs": 10,
    }
    one = data.graphs("val")[2]
    assert one.x[0, 0] == 2
    assert not one.is_directed
    assert ZINC(str(tmp_path)).schema["mean"] == [0.5]
    with pytest.raises(FileNotFoundError, match="Create the data set once with PyTorch Geometric"):
        LRGB("coco-sp", str(tmp_path)).setup()
    with pytest.raises(ValueError, match="peptides-func, peptides-struct"):
        LRGB("peptides", str(tmp_path))
    torch.save({"model": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no file of graphs as PyG"):
        read_processed(tmp_path / "other.pt")


def test_real_sets(shared_data):
    folder = shared_data / "graphs"
    if not (folder / "esol.npz").is_file():
        pytest.skip("no packed graphs")
    esol = Packed(str(folder / "esol.npz"))
    assert [len(esol.graphs(part)) for part in ("train", "val", "test")] == [902, 113, 113]
    assert len(esol.schema["node_vocab"]) == 9
    assert esol.schema["scale"][0] == pytest.approx(2.1, abs=0.05)
    trees = Packed(str(folder / "pyast.npz"), target="classes", node_columns=[0])
    assert trees.schema["num_outputs"] == 10
    tree = trees.graphs("test")[0]
    assert tree.num_edges == tree.num_nodes - 1
    cora = Cora(str(folder / "cora.npz"))
    assert [int((cora.graphs(part)[0].y >= 0).sum()) for part in ("train", "val", "test")] == [140, 500, 1000]
    assert cora.graphs("train")[0].num_edges == 2 * 5278
