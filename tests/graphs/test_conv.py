"""ChimeraConv: the layer of PyG's shape, with and without PyG."""

import importlib.util

import pytest
import torch

from omnissm.graphs import ChimeraConv
from omnissm.graphs.conv import separate_ptr
from omnissm.ssmcore.mixers import graph_topology

needs_pyg = pytest.mark.skipif(not importlib.util.find_spec("torch_geometric"), reason="needs torch_geometric")
EDGES = torch.tensor([[0, 1, 2, 4, 5, 6, 6], [1, 2, 0, 5, 6, 5, 4]])  # a ring of 3, a node alone, a graph of 3


def test_runs_of_nodes_that_no_edge_leaves():
    assert separate_ptr(EDGES, 8).tolist() == [0, 3, 4, 7, 8]
    assert separate_ptr(EDGES[:, :0], 2).tolist() == [0, 1, 2]
    assert separate_ptr(torch.tensor([[0, 1], [2, 3]]), 5).tolist() == [0, 4, 5]  # interleaved parts stay together
    assert separate_ptr(EDGES[:, :0], 0).tolist() == [0]


@pytest.mark.parametrize("mode", ["auto", "dag", "general"])
def test_batch_alone_and_shuffled_edges(mode):
    conv = ChimeraConv(6, 8, edge_dim=1, nheads=2, d_state=3, mode=mode).double()
    edges = EDGES.sort(0).values if mode == "dag" else EDGES
    x, label = torch.randn(8, 6).double(), torch.randn(7).double()
    batch = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3])
    y = conv(x, edges, label)
    assert y.shape == (8, 8)
    torch.testing.assert_close(conv(x, edges, label[:, None], batch), y)
    torch.testing.assert_close(conv(x[4:7], edges[:, 3:] - 4, label[3:]), y[4:7])
    order = torch.randperm(7)
    torch.testing.assert_close(conv(x, edges[:, order], label[order]), y)
    torch.testing.assert_close(conv(x, edges, label, topology=graph_topology(edges, 8)), y)


def test_a_solved_dag_is_the_scanned_one():
    edges, x = EDGES.sort(0).values, torch.randn(8, 4).double()
    auto, general = (ChimeraConv(4, 4, nheads=2, mode=mode).double() for mode in ("auto", "general"))
    general.load_state_dict(auto.state_dict())
    torch.testing.assert_close(auto(x, edges), general(x, edges))


def test_reset_and_repr():
    conv = ChimeraConv(4, 8, nheads=2, expand=2)
    assert repr(conv) == "ChimeraConv(4, 8, nheads=2)"
    assert conv.mixer.nheads == 2
    before = {name: p.clone() for name, p in conv.named_parameters()}
    conv.reset_parameters()
    assert not torch.equal(before["mixer.in_proj.weight"], conv.mixer.in_proj.weight)
    assert not torch.equal(before["lin.weight"], conv.lin.weight)
    assert torch.equal(before["mixer.D"], conv.mixer.D)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChimeraConv(4, 6, nheads=4), "multiple of nheads=4"),
        (lambda: ChimeraConv(4, 8, mode="tree"), "auto, dag, general"),
        (lambda: ChimeraConv(4, 8, mode="dag")(torch.zeros(3, 4), EDGES[:, :3]), "has a cycle"),
        (lambda: ChimeraConv(4, 8)(torch.zeros(2, 4), EDGES[:, :3]), "names node 2, expected ids from 0 to 1"),
        (lambda: ChimeraConv(4, 8)(torch.zeros(3, 5), EDGES[:, :3]), "must have shape .nodes, 4."),
        (lambda: ChimeraConv(4, 8)(torch.zeros(3, 4), EDGES[:, :3], None, torch.tensor([0, 0, 1])), "joins two graphs"),
        (lambda: ChimeraConv(4, 8, edge_dim=2)(torch.zeros(3, 4), EDGES[:, :3]), "`edge_attr` is missing"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@needs_pyg
def test_inside_sequential_and_gps():
    from torch_geometric.nn import GPSConv, Sequential

    x, label = torch.randn(8, 8), torch.randn(7, 3)
    batch = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3])
    layers = [
        (ChimeraConv(8, 16, edge_dim=3, nheads=2), "x, edge_index, edge_attr -> x"),
        torch.nn.GELU(),
        (ChimeraConv(16, 4, nheads=2), "x, edge_index -> x"),
    ]
    net = Sequential("x, edge_index, edge_attr", layers)
    assert net(x, EDGES, label).shape == (8, 4)
    gps = GPSConv(8, ChimeraConv(8, 8, edge_dim=3, nheads=2), heads=2, norm=None)
    gps.reset_parameters()
    y = gps(x, EDGES, batch, edge_attr=label)
    y.sum().backward()
    assert gps.conv.mixer.in_proj.weight.grad.any()
    other = GPSConv(8, ChimeraConv(8, 8, edge_dim=3, nheads=2), heads=2, norm=None)
    other.load_state_dict(gps.state_dict())
    torch.testing.assert_close(
        other.eval()(x, EDGES, batch, edge_attr=label), gps.eval()(x, EDGES, batch, edge_attr=label)
    )
