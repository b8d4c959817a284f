"""Tensors on a CPU are worked on there, whatever `torch.set_default_device` says."""

import pytest
import torch

from omnissm.kernels import causal_conv1d, dag_order, graph_edges, ssd
from omnissm.kernels.quasiseparable.rows import hydra_rows


@pytest.fixture(autouse=True)
def _another_default():
    before = torch.get_default_device()
    yield
    torch.set_default_device(before)


def tensors_of(value):
    found = [one for one in vars(value).values() if isinstance(one, torch.Tensor)]
    return found + [one for bucket in getattr(value, "buckets", None) or () for one in tensors_of(bucket)]


@pytest.mark.parametrize("function", [dag_order, graph_edges])
@pytest.mark.parametrize("edges", [[[0, 1, 1, 3], [1, 2, 3, 4]], [list(range(100)), list(range(1, 101))]], ids=len)
def test_orders_of_graphs(function, edges):
    edges = torch.tensor(edges)
    nodes = int(edges.max()) + 1
    expected = tensors_of(function(edges, nodes))
    torch.set_default_device("meta")
    found = tensors_of(function(edges, nodes))
    assert len(found) == len(expected) > 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_graphs_with_cycles():
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 0, 4]])
    expected = tensors_of(graph_edges(edges, 5))
    torch.set_default_device("meta")
    found = tensors_of(graph_edges(edges, 5))
    assert len(found) == len(expected) > 8  # those of buckets too
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_states_of_packed_sequences():
    x, log_decay, B = torch.randn(1, 7, 2, 3), -torch.rand(1, 7, 2), torch.randn(1, 7, 1, 4)
    bounds = torch.tensor([0, 3, 7])
    expected = ssd(x, log_decay, B, B, cu_seqlens=bounds, final_states="segments")
    torch.set_default_device("meta")
    found = ssd(x, log_decay, B, B, cu_seqlens=bounds, final_states="segments")
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_layers_on_a_cpu():
    x, weight = torch.randn(2, 9, 4, requires_grad=True), torch.randn(4, 3)
    heads, d, n = 2, 4, 3
    mixed = d + 4 * n
    parts = (2, 28, d + mixed + 2 * heads), (mixed, 1, 7), (mixed,), (heads,), (heads,), (heads, d), (heads,), (d,)
    projected, *weights = (torch.randn(shape) for shape in parts)

    def run():
        y = causal_conv1d(x, weight, backend="chunked")[0]
        return *torch.autograd.grad(y, x, torch.ones_like(y)), hydra_rows(projected, *weights, d_state=n, eps=1e-5)

    expected = run()
    torch.set_default_device("meta")
    for found, wanted in zip(run(), expected, strict=True):
        assert torch.equal(found, wanted)
