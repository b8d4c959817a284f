"""graph_ssm: chains are Mamba-2's scan, every kind of graph takes its cheapest operator, norms keep their bounds."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

from omnissm.kernels import use_backend
from omnissm.kernels.testing import relative_error
from omnissm.ssmcore.mixers import GraphSSM, create_mixer, graph_topology


def random_graph(nodes, edges, seed=0, acyclic=True):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, nodes, (2, 4 * edges), generator=generator)
    ends = ends[:, ends[0] != ends[1]][:, :edges]
    return ends.sort(0).values if acyclic else ends


def mixer_of(**options):
    torch.manual_seed(0)
    return GraphSSM(12, **{"d_state": 3, "headdim": 4} | options).double()


def nodes_of(count, seed=1):
    return torch.randn(count, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


OPTIONS = [
    {},
    {"bidirectional": True, "ngroups": 3, "expand": 2, "headdim": 8},
    {"d_edge": 2, "edge_step": "mean", "edge_norm": "none"},
    {"d_edge": 2, "edge_step": "rms", "edge_norm": "sqrt_both", "conv": "depthwise"},
    {"edge_norm": "sqrt_in", "conv": "gcn", "learn_a": True, "norm_before_gate": True},
    {"acyclic": False},
    {"acyclic": False, "edge_norm": "in_sum", "d_edge": 2, "bidirectional": True},
    {"acyclic": False, "edge_step": "symmetric", "edge_norm": "sym", "d_edge": 2, "input_gain": "own"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matrix_times_values_and_gradients(options):
    mixer = mixer_of(**options)
    edge_index = random_graph(9, 14, acyclic=mixer.acyclic)
    graph = graph_topology(edge_index, 9)
    x = nodes_of(9).requires_grad_()
    edge_attr = torch.randn(14, 2, dtype=torch.float64) if mixer.d_edge else None
    _, values, scans = mixer._inputs(x, graph, edge_attr)
    parts = [mixer._scan(scan, graph, i) for i, scan in enumerate(scans)]
    y = torch.stack(parts).sum(0) / math.sqrt(len(parts)) + mixer.D[:, None] * values
    matrix = mixer.mixing_matrix(x, graph, edge_attr=edge_attr)
    torch.testing.assert_close(torch.einsum("hts,shp->thp", matrix, values), y)
    mixer(x, graph, edge_attr=edge_attr).square().sum().backward()
    for name, p in [("x", x), *mixer.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


def test_a_path_is_the_scan_of_mamba2():
    """The same numbers by the loop of the equation: decay by the step of the node reached, input times that step."""
    mixer = mixer_of(edge_norm="none")
    length = 7
    graph = graph_topology(torch.stack([torch.arange(6), torch.arange(1, 7)]), length)
    assert graph.chains is not None
    x = nodes_of(length)
    _, values, (scan,) = mixer._inputs(x, graph, None)
    found = mixer._scan(scan, graph, 0)
    state = torch.zeros(3, 4, 3, dtype=torch.float64)
    for t in range(length):
        dt = scan.gain[t][:, None, None]
        state = torch.exp(-dt) * state + dt * values[t][..., None] * scan.B[t][:, None]
        assert relative_error(found[t], (state * scan.C[t][:, None]).sum(-1)) < 1e-12


@pytest.mark.parametrize("bidirectional", [False, True])
def test_chains_by_the_1d_scan_equal_the_graph_scan(bidirectional):
    mixer = mixer_of(bidirectional=bidirectional)
    names = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    pieces = names.split([1, 9, 3, 7])
    edge_index = torch.cat([torch.stack([piece[:-1], piece[1:]]) for piece in pieces], dim=1)
    graph = graph_topology(edge_index[:, torch.randperm(edge_index.shape[1])], 20)
    assert graph.chains is not None
    x = nodes_of(20)
    torch.testing.assert_close(mixer(x, graph), mixer(x, replace(graph, chains=None)))


def test_reference_agrees():
    mixer = mixer_of(bidirectional=True)
    graph = graph_topology(random_graph(15, 30), 15)
    x = nodes_of(15)
    with use_backend("reference"):
        expected = mixer(x, graph)
    torch.testing.assert_close(mixer(x, graph), expected)


@pytest.mark.parametrize("acyclic", [True, False])
def test_alone_and_in_a_batch_and_renamed(acyclic):
    mixer = mixer_of(acyclic=acyclic, bidirectional=True)
    graphs = [random_graph(5, 6, 1, acyclic), random_graph(1, 0), random_graph(9, 20, 2, acyclic)]
    x = nodes_of(15)
    starts = torch.tensor([0, 5, 6, 15])
    joined = torch.cat([graph + start for graph, start in zip(graphs, starts)], dim=1)
    together = mixer(x, graph_topology(joined, 15, ptr=starts))
    alone = [mixer(part, graph_topology(graph, len(part))) for part, graph in zip(x.split([5, 1, 9]), graphs)]
    torch.testing.assert_close(together, torch.cat(alone))

    names = torch.randperm(15)
    shuffled = names[joined][:, torch.randperm(joined.shape[1])]
    renamed = mixer(torch.empty_like(x).index_copy(0, names, x), graph_topology(shuffled, 15))
    torch.testing.assert_close(renamed[names], together)


@pytest.mark.parametrize(("norm", "step"), [("out", "mean"), ("in_sum", "mean"), ("sym", "symmetric")])
@pytest.mark.parametrize("gamma", [0.9, 0.99])
def test_norms_of_general_graphs_contract(norm, step, gamma):
    mixer = mixer_of(acyclic=False, edge_norm=norm, edge_step=step, gamma=gamma, leak_init=0.5)
    ends = random_graph(30, 80, acyclic=False)
    ends = torch.cat([ends, ends.flip(0)], dim=1).unique(dim=1)
    graph = graph_topology(ends, 30)
    _, _, (scan,) = mixer._inputs(nodes_of(30), graph, None)
    source, target = ends
    A = torch.zeros(mixer.nheads, 30, 30, dtype=torch.float64)
    A.index_put_((torch.arange(mixer.nheads)[:, None], target, source), scan.decay.T.exp(), accumulate=True)
    size = {"out": A.sum(1).amax(), "in_sum": A.sum(2).amax(), "sym": torch.linalg.matrix_norm(A, 2).amax()}[norm]
    assert size <= gamma + 1e-9
    if norm == "sym":
        torch.testing.assert_close(A, A.mT)


def test_symmetric_norm_of_a_large_graph():
    """More nodes than dense forms are for, and a hub: sums of weights far above 1, their spectral norm below it."""
    mixer = mixer_of(acyclic=False, edge_norm="sym", edge_step="symmetric")
    star = torch.stack([torch.zeros(599, dtype=torch.long), torch.arange(1, 600)])
    graph, x = graph_topology(torch.cat([star, star.flip(0)], dim=1), 600), nodes_of(600)
    found = mixer(x, graph)
    mixer.method = "dense"
    assert relative_error(found, mixer(x, graph)) < 1e-5


def test_norm_in_keeps_answers_bounded_by_the_levels():
    """A hundred levels of three parents each: paths multiply, an average of parents does not."""
    levels, width = 100, 3
    source = torch.arange((levels - 1) * width).view(-1, width).repeat(1, width).flatten()
    target = (torch.arange((levels - 1) * width) + width).repeat_interleave(width)
    graph = graph_topology(torch.stack([source, target]), levels * width)
    mixer = mixer_of(dt_min=1e-4, dt_max=1e-4)
    _, _, (scan,) = mixer._inputs(nodes_of(levels * width), graph, None)
    ones = torch.ones_like(scan.values), torch.ones_like(scan.B), torch.ones_like(scan.C)
    unit = replace(scan, values=ones[0], B=ones[1] / 3, C=ones[2])
    assert mixer._scan(unit, graph, 0).max() <= levels + 1e-6
    doubled = replace(unit, decay=scan.decay + math.log(3))
    assert mixer._scan(doubled, graph, 0).max() > 1e30


def test_growing_states_are_warned_of_once():
    """Deep graphs with short steps and the norm that lets them grow; not chains of 33, long steps or other norms."""

    def caught(levels, norm="sqrt_in", dt=1e-2):
        mixer = mixer_of(edge_norm=norm, dt_min=dt, dt_max=dt)
        chain = torch.arange(levels)
        ends = torch.cat([torch.stack([chain[:-1], chain[1:]]), torch.stack([chain[:-2], chain[2:]])], dim=1)
        graph = graph_topology(ends, levels)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                mixer(nodes_of(levels), graph)
        return [str(one.message) for one in seen]

    (message,) = caught(40)
    assert "on a graph of 40 levels" in message
    assert "edge_norm='in'" in message
    assert caught(33) == caught(40, "in") == caught(40, dt=2.0) == []


def test_autocast_keeps_steps_wide():
    torch.manual_seed(0)
    mixer = GraphSSM(32, acyclic=False)
    graph = graph_topology(random_graph(50, 100, acyclic=False), 50)
    x = torch.randn(50, 32)
    expected = mixer(x, graph)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixer(x, graph)
    assert relative_error(found, expected) < 2e-2


def test_wrong_arguments():
    mixer = mixer_of()
    cycle = graph_topology(torch.tensor([[0, 1], [1, 0]]), 2)
    with pytest.raises(ValueError, match=r"acyclic=False.*nodes 0 -> 1 -> 0|1 -> 0 -> 1"):
        mixer(nodes_of(2), cycle)
    graph = graph_topology(torch.tensor([[0], [1]]), 2)
    with pytest.raises(ValueError, match=r"must be \(2, 12\)"):
        mixer(nodes_of(3), graph)
    with pytest.raises(ValueError, match="`edge_attr` was not expected"):
        mixer(nodes_of(2), graph, edge_attr=torch.ones(1, 2))
    with pytest.raises(ValueError, match="`edge_attr` is missing"):
        mixer_of(d_edge=2)(nodes_of(2), graph)
    with pytest.raises(ValueError, match=r"shape \(1, 2\), got \(1, 3\)"):
        mixer_of(d_edge=2)(nodes_of(2), graph, edge_attr=torch.ones(1, 3))
    with pytest.raises(ValueError, match="edge_norm must be one of none, sqrt_in"):
        mixer_of(edge_norm="max")
    with pytest.raises(ValueError, match="needs edge_step='symmetric'"):
        mixer_of(edge_norm="sym")
    with pytest.raises(ValueError, match="multiple of headdim=5"):
        mixer_of(headdim=5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        mixer_of(gamma=1.0)


def test_by_name():
    assert isinstance(create_mixer("graph_ssm", 16, d_state=2), GraphSSM)


def _grid_edges(*shape):
    """Edges of grids to the right and down, shuffled."""
    cells = torch.arange(torch.Size(shape).numel()).view(shape)
    pairs = [(cells[:, :, :-1], cells[:, :, 1:]), (cells[:, :-1], cells[:, 1:])]
    ends = torch.cat([torch.stack([u.flatten(), v.flatten()]) for u, v in pairs], dim=1)
    return ends[:, torch.randperm(ends.shape[1])]


@pytest.mark.parametrize("learn_a", [False, True])
def test_grids_by_the_2d_scan_equal_the_graph_scan(learn_a, monkeypatch):
    """Two grids of 4 x 3 cells in both directions; the route is found from the edges, in any order."""
    ends = _grid_edges(2, 4, 3)
    topology = graph_topology(ends, 24, ptr=torch.tensor([0, 12, 24]))
    assert topology.grid == (2, 4, 3)
    mixer = mixer_of(bidirectional=True, learn_a=learn_a)
    if learn_a:
        torch.nn.init.normal_(mixer.A_log)
    x, plain = nodes_of(24), replace(topology, grid=None)
    assert not mixer._by_grid(x)  # on a CPU levels are faster
    monkeypatch.setattr(GraphSSM, "_by_grid", lambda *_: True)
    torch.testing.assert_close(mixer(x, topology), mixer(x, plain))
    torch.testing.assert_close(mixer.mixing_matrix(x, topology), mixer.mixing_matrix(x, plain))
    ours = torch.autograd.grad(mixer(x, topology).square().sum(), list(mixer.parameters()))
    theirs = torch.autograd.grad(mixer(x, plain).square().sum(), list(mixer.parameters()))
    torch.testing.assert_close(ours, theirs)
    assert graph_topology(ends[:, 1:], 24).grid is None
    assert graph_topology(ends, 24).grid is None


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 4, 3), (3, 14, 14), (1, 40, 33)])
def test_a_gpu_takes_grids_by_the_2d_scan(shape, monkeypatch):
    """Outputs and gradients are those of the levels, and of a CPU."""
    nodes = torch.Size(shape).numel()
    topology = graph_topology(_grid_edges(*shape), nodes, ptr=torch.arange(0, nodes + 1, nodes // shape[0]))
    mixer, x = mixer_of(bidirectional=True).float(), nodes_of(nodes).float()
    cpu = [mixer(x, topology), *torch.autograd.grad(mixer(x, topology).square().sum(), list(mixer.parameters()))]
    mixer, x, topology = mixer.cuda(), x.cuda(), topology.to("cuda")
    assert topology.grid == shape
    assert mixer._by_grid(x)
    calls = []
    by_scan = GraphSSM._scan_grid
    monkeypatch.setattr(GraphSSM, "_scan_grid", lambda *given: calls.append(1) or by_scan(*given))
    for plain in (topology, replace(topology, grid=None)):
        y = mixer(x, plain)
        found = [y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))]
        for value, expected in zip(found, cpu, strict=True):
            torch.testing.assert_close(value.cpu(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert len(calls) == 2  # one for each direction, none without the grid
