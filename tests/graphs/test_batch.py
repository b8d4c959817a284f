"""Graphs and batches: joining and taking apart, what is refused, moving, and PyG's objects."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.utilities import move_data_to_device

from omnissm.graphs import Graph, collate, create_model, from_pyg, to_pyg
from omnissm.graphs.pyg import as_batch

HAS_PYG = importlib.util.find_spec("torch_geometric") is not None


def graph(nodes, edges, **parts):
    ends = torch.tensor(edges, dtype=torch.int64).view(-1, 2).t()
    return Graph(torch.arange(nodes)[:, None], ends, **parts)


def three():
    """A triangle without its last side, nothing at all, one node, a pair with two parallel edges."""
    shapes = [(3, [[0, 1], [1, 2]]), (0, []), (1, []), (2, [[0, 1], [0, 1]])]
    return [
        graph(
            nodes,
            edges,
            edge_attr=torch.full((len(edges), 1), nodes),
            y=torch.tensor([nodes]),
            pe=torch.rand(nodes, 2),
        )
        for nodes, edges in shapes
    ]


def test_collate_numbers_over_the_batch_and_back():
    graphs = three()
    batch = collate(graphs)
    assert batch.edge_index.tolist() == [[0, 1, 4, 4], [1, 2, 5, 5]]
    assert batch.ptr.tolist() == [0, 3, 3, 4, 6]
    assert batch.batch.tolist() == [0, 0, 0, 2, 3, 3]
    assert batch.edge_batch.tolist() == [0, 0, 3, 3]
    assert batch.y.tolist() == [3, 0, 1, 2]
    assert (batch.num_graphs, batch.num_nodes) == (4, 6)
    assert batch.topology.acyclic
    for one, other in zip(graphs, batch.graphs(), strict=True):
        for name in ("x", "edge_index", "edge_attr", "y", "pe"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_pairs_and_targets_of_nodes():
    graphs = [
        graph(3, [[0, 1]], pairs=torch.tensor([[0], [2]]), y=torch.tensor([1.0])),
        graph(2, [], pairs=torch.tensor([[0, 1], [1, 0]]), y=torch.tensor([0.0, 1.0])),
    ]
    batch = collate(graphs)
    assert batch.pairs.tolist() == [[0, 3, 4], [2, 4, 3]]
    back = batch.graphs()
    assert back[1].pairs.tolist() == [[0, 1], [1, 0]]
    assert back[1].y.tolist() == [0.0, 1.0]
    nodes = collate([graph(2, [], y=torch.tensor([5, 6])), graph(1, [], y=torch.tensor([7]))])
    assert [one.y.tolist() for one in nodes.graphs()] == [[5, 6], [7]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: graph(2, [[0, 2]]), ValueError, "names node 2, expected ids from 0 to 1"),
        (lambda: graph(2, [[-1, 0]]), ValueError, "names node -1"),
        (lambda: Graph(torch.zeros(2), torch.zeros(2, 0, dtype=torch.int64)), ValueError, "(nodes, features)"),
        (lambda: Graph(torch.zeros(2, 1), torch.zeros(2, 0)), TypeError, "must hold integers"),
        (lambda: Graph(torch.zeros(2, 1), torch.zeros(3, 1, dtype=torch.int64)), ValueError, "shape (2, number)"),
        (lambda: graph(2, [[0, 1]], edge_attr=torch.zeros(2, 1)), ValueError, "`edge_attr` must have shape (1"),
        (lambda: collate([]), ValueError, "at least one graph"),
        (lambda: collate([graph(1, []), graph(1, [], y=torch.zeros(1))]), ValueError, "1 of 2 graphs have `y`"),
        (lambda: collate([graph(1, []), graph(1, [], is_directed=False)]), ValueError, "some graphs are directed"),
        (lambda: as_batch("graph"), TypeError, "without `x`"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_edges_across_graphs_are_refused():
    batch = collate(three(), topology=False)
    broken = SimpleNamespace(x=batch.x, edge_index=torch.tensor([[0], [5]]), batch=batch.batch, ptr=batch.ptr)
    with pytest.raises(ValueError, match="joins nodes 0 and 5 of two graphs"):
        as_batch(broken).with_topology()


def test_lightning_moves_it_whole():
    batch = move_data_to_device(collate(three()), torch.device("meta"))
    assert batch.x.is_meta
    assert batch.topology.edges.src.is_meta
    assert not batch.topology.edges.order.level_ptr.is_meta  # walked on the CPU
    assert batch.num_graphs == 4


@pytest.mark.gpu
def test_pinned_batches_move_without_waiting():
    batch = collate(three()).pin_memory()
    assert batch.x.is_pinned()
    assert batch.topology.edges.src.is_pinned()
    assert batch.to("cuda", non_blocking=True).topology.edge_index.is_cuda


def test_objects_with_the_attributes_of_pyg():
    data = SimpleNamespace(
        x=torch.tensor([1, 2, 0]), edge_index=torch.tensor([[0, 1], [1, 2]]), edge_attr=torch.tensor([0.5, 1.5])
    )
    one = from_pyg(data)
    assert one.x.tolist() == [[1], [2], [0]]
    assert one.edge_attr.shape == (2, 1)
    net = create_model("dag_ssm_tiny", node_vocab=[3], edge_features=1).eval()
    data.batch = torch.tensor([0, 0, 0])  # no `ptr`: counted
    torch.testing.assert_close(net(data), net(one))
    if not HAS_PYG:
        with pytest.raises(ImportError, match="pip install torch_geometric"):
            to_pyg(one)


@pytest.mark.skipif(not HAS_PYG, reason="needs torch_geometric")
def test_pyg_batches():
    from torch_geometric.data import Batch, Data

    graphs = [one for one in three() if one.num_nodes]
    batch = Batch.from_data_list([to_pyg(one) for one in graphs])
    ours = collate(graphs, topology=False)
    read = as_batch(batch)
    for name in ("x", "edge_index", "edge_attr", "y", "pe", "batch", "ptr"):
        assert torch.equal(getattr(read, name), getattr(ours, name)), name
    back = from_pyg(to_pyg(graphs[0]))
    assert torch.equal(back.edge_index, graphs[0].edge_index)
    mirrored = Data(x=torch.zeros(2, 1), edge_index=torch.tensor([[0, 1], [1, 0]]))
    assert not from_pyg(mirrored).is_directed
