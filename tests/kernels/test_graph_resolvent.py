"""graph_resolvent: its methods against each other, against dag_scan and against bounds; bad input."""

import pytest
import torch

from omnissm.kernels import ConvergenceError, choose_method, dag_order, dag_scan, graph_edges, graph_resolvent
from omnissm.kernels.dag_scan.spec import make_inputs as make_dag
from omnissm.kernels.dispatch import BackendError
from omnissm.kernels.graph_resolvent.spec import make_inputs
from omnissm.kernels.testing import relative_error, run_with_gradients


def inputs_of(v=60, e=120, dtype=torch.float64, seed=0, **options):
    sizes = {"h": 2, "p": 3, "n": 2} | options
    generator = torch.Generator().manual_seed(seed)
    return make_inputs(v, e, **sizes, dtype=dtype, device="cpu", generator=generator)


@pytest.mark.parametrize("graphs", [1, 4])
@pytest.mark.parametrize("gamma", [0.5, 0.95])
def test_methods_agree(graphs, gamma):
    inputs = inputs_of(graphs=graphs, gamma=gamma)
    cotangents = {"y": torch.randn_like(inputs["x"])}
    expected = run_with_gradients(lambda **kw: graph_resolvent(**kw, backend="reference"), inputs, ("y",), cotangents)
    for options in ({"method": "dense"}, {"method": "series", "terms": 1024}, {"method": "iterative", "tol": 1e-9}):
        found = run_with_gradients(lambda **kw: graph_resolvent(**kw), inputs | options, ("y",), cotangents)
        for name, value in found.items():
            assert relative_error(value, expected[name]) < 1e-7, (options, name)


def test_methods_agree_on_complete_and_disconnected_graphs():
    """Twenty nodes each joined to each with sums of 0.99, a ring beside them and nodes without edges."""
    pairs = torch.cartesian_prod(torch.arange(20), torch.arange(20)).T
    ring = torch.stack([torch.arange(20, 30), torch.arange(20, 30).roll(-1)])
    edge_index = torch.cat([pairs[:, pairs[0] != pairs[1]], ring], dim=1)
    weight = torch.cat([torch.full((380, 2), 0.99 / 19), torch.full((10, 2), 0.99)]).double()
    inputs = inputs_of(v=33, e=0) | {"edge_index": edge_index, "edge_decay": weight.log()}
    inputs |= {"edges": graph_edges(edge_index, 33)}
    cotangents = {"y": torch.randn_like(inputs["x"])}
    expected = run_with_gradients(lambda **kw: graph_resolvent(**kw, backend="reference"), inputs, ("y",), cotangents)
    iterative = {"method": "iterative", "tol": 1e-9, "max_iter": 4000}
    for options in ({"method": "dense"}, {"method": "series", "terms": 4096}, iterative):
        for name, value in run_with_gradients(graph_resolvent, inputs | options, ("y",), cotangents).items():
            assert relative_error(value, expected[name]) < 1e-7, (options, name)


def test_dense_by_states_equals_dense_by_masks():
    """Graphs with more nodes than p * n are solved for their states."""
    small, large = inputs_of(v=40, p=30, n=2), inputs_of(v=40, p=3, n=2)
    for inputs in (small, large):
        expected = graph_resolvent(**inputs, backend="reference")
        assert relative_error(graph_resolvent(**inputs), expected) < 1e-12


@pytest.mark.parametrize("method", ["auto", "dense", "series"])
def test_graphs_without_cycles(method):
    generator = torch.Generator().manual_seed(0)
    inputs = make_dag(40, 70, 2, 3, 2, dtype=torch.float64, device="cpu", generator=generator)
    expected = dag_scan(**inputs)
    arguments = {name: inputs[name] for name in ("x", "edge_decay", "B", "C", "edge_index")}
    edges = graph_edges(inputs["edge_index"], 40)
    assert choose_method(edges)[0] == "dag"
    assert relative_error(graph_resolvent(**arguments, edges=edges, method=method), expected) < 1e-12


@pytest.mark.parametrize("method", ["dense", "series", "iterative"])
def test_a_batch_is_its_graphs_one_by_one(method):
    """Very different sizes; the terms of a series are each graph's own."""
    graphs = [inputs_of(v=v, e=e, seed=v) for v, e in ((1, 1), (100, 220), (7, 9), (33, 60), (30, 45))]
    options = {"method": method, "tol": 1e-12}
    separate = torch.cat([graph_resolvent(**graph | options) for graph in graphs])
    starts = torch.tensor([0, 1, 101, 108, 141, 171])
    edge_index = torch.cat([graph["edge_index"] + start for graph, start in zip(graphs, starts)], dim=1)
    joined = {name: torch.cat([graph[name] for graph in graphs]) for name in ("x", "edge_decay", "B", "C")}
    edges = graph_edges(edge_index, 171, ptr=starts)
    assert len(edges.buckets) > 2
    found = graph_resolvent(**joined, edge_index=edge_index, edges=edges, **options)
    assert relative_error(found, separate) < (1e-9 if method == "iterative" else 1e-13)


@pytest.mark.parametrize("method", ["auto", "iterative"])
def test_a_small_graph_beside_a_large_one_with_large_values(method):
    """To the last digit: neither the method nor when it stops hangs on the neighbours."""
    graphs = [inputs_of(v=v, e=2 * v, seed=v, dtype=torch.float32) for v in (7, 540, 520, 12)]
    for k, graph in enumerate(graphs):
        graph["x"] *= 1e4 if k == 1 else 1
        graph["method"] = method
    graphs[2]["edge_decay"] -= 3  # contracts more than the others
    starts = torch.tensor([0, 7, 547, 1067, 1079])
    edge_index = torch.cat([graph["edge_index"] + start for graph, start in zip(graphs, starts)], dim=1)
    names = ("x", "edge_decay", "B", "C")
    joined = {name: torch.cat([graph[name] for graph in graphs]) for name in names}
    joined |= {"edge_index": edge_index, "edges": graph_edges(edge_index, 1079, ptr=starts), "method": method}
    cotangents = [{"y": torch.randn_like(graph["x"])} for graph in graphs]
    alone = [
        run_with_gradients(graph_resolvent, graph | {"tol": 1e-5}, ("y",), one)
        for graph, one in zip(graphs, cotangents, strict=True)
    ]
    every = {"y": torch.cat([one["y"] for one in cotangents])}
    together = run_with_gradients(graph_resolvent, joined | {"tol": 1e-5}, ("y",), every)
    sizes = [len(graph["x"]) for graph in graphs]
    for name, value in together.items():
        counts = [graph["edge_index"].shape[1] for graph in graphs] if "edge_decay" in name else sizes
        for found, one in zip(value.split(counts), alone, strict=True):
            assert relative_error(found, one[name]) < 1e-6, name


def symmetric(v, edges, gamma):
    """Weights gamma w / sqrt(d_u d_v) on undirected edges, parallel ones among them: their spectral norm is gamma."""
    edge_index = torch.cat([edges, edges.flip(0)], dim=1)
    weight = torch.rand(edges.shape[1], 2, dtype=torch.float64).repeat(2, 1) + 0.1
    sums = torch.zeros(v, 2, dtype=torch.float64).index_add(0, edge_index[0], weight)
    weight = gamma * weight / (sums[edge_index[0]] * sums[edge_index[1]]).sqrt()
    inputs = inputs_of(v=v, e=0) | {"edge_index": edge_index, "edge_decay": weight.log()}
    return inputs | {"edges": graph_edges(edge_index, v), "method": "iterative", "tol": 1e-10}


@pytest.mark.parametrize("gamma", [0.9, 0.99])
def test_conjugate_gradients(gamma):
    """A star, whose sums are far above 1, and random edges."""
    star = torch.stack([torch.zeros(59, dtype=torch.long), torch.arange(1, 60)])
    for edges in (star, torch.randint(0, 60, (2, 150))):
        inputs = symmetric(60, edges, gamma)
        if edges is star:
            with pytest.raises(ValueError, match="sum to less than 1"):
                graph_resolvent(**inputs)
        inputs |= {"spectral_bound": gamma, "max_iter": 100}
        cotangents = {"y": torch.randn_like(inputs["x"])}
        dense = {"method": "dense", "backend": "reference"}
        expected = run_with_gradients(graph_resolvent, inputs | dense, ("y",), cotangents)
        for name, value in run_with_gradients(graph_resolvent, inputs, ("y",), cotangents).items():
            assert relative_error(value, expected[name]) < 1e-8, name


def test_a_spectral_bound_without_symmetry():
    """One way only: the same norm, by the plain iteration. Bounds that do not hold are found out."""
    inputs = symmetric(60, torch.randint(0, 60, (2, 150)), 0.9)
    ends, decay = inputs["edge_index"][:, :250], inputs["edge_decay"][:250]
    inputs |= {"edge_index": ends, "edge_decay": decay, "edges": graph_edges(ends, 60), "spectral_bound": 0.9}
    expected = graph_resolvent(**inputs, backend="reference")
    assert relative_error(graph_resolvent(**inputs), expected) < 1e-8
    with pytest.raises(ConvergenceError, match="allowed"):
        graph_resolvent(**inputs | {"edge_decay": decay + 1})
    inputs = symmetric(60, torch.randint(0, 60, (2, 150)), 0.9) | {"spectral_bound": 0.9}
    with pytest.raises(ValueError, match=r"not below spectral_bound=0\.9"):
        graph_resolvent(**inputs | {"edge_decay": inputs["edge_decay"] + 1})
    with pytest.raises(ValueError, match="between 0 and 1"):
        graph_resolvent(**inputs | {"spectral_bound": 1.0})


def test_iterations_suffice_for_slow_contractions():
    """A ring of 600 nodes whose weights sum to 0.99, in float32: hundreds of steps, and no end at their rounding."""
    places = torch.arange(600)
    ring = torch.stack([torch.cat([places, places]), torch.cat([places.roll(1), places.roll(-1)])])
    inputs = inputs_of(v=600, e=0, dtype=torch.float32) | {"edge_index": ring, "edges": graph_edges(ring, 600)}
    inputs |= {"edge_decay": torch.full((1200, 2), 0.495).log(), "method": "auto", "tol": 1e-5}
    floating = {name: x.double() for name, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point()}
    cotangents = {"y": torch.ones_like(inputs["x"])}
    dense = inputs | floating | {"method": "dense"}
    expected = run_with_gradients(graph_resolvent, dense, ("y",), {"y": cotangents["y"].double()})
    for name, value in run_with_gradients(graph_resolvent, inputs, ("y",), cotangents).items():
        assert relative_error(value, expected[name]) < 1e-5, name


def test_graphs_without_nodes_beside_a_large_one():
    inputs = inputs_of(v=520, e=900, dtype=torch.float32)
    expected = graph_resolvent(**inputs)
    for starts in ([0, 0, 520], [0, 520, 520], [0, 0, 520, 520]):
        edges = graph_edges(inputs["edge_index"], 520, ptr=torch.tensor(starts))
        assert torch.equal(graph_resolvent(**inputs | {"edges": edges}), expected)


def test_iteration_without_edges():
    edge_index = torch.zeros(2, 0, dtype=torch.long)
    inputs = inputs_of(v=5, e=0) | {"edge_index": edge_index, "edge_decay": torch.zeros(0, 2).double()}
    inputs |= {"edges": graph_edges(edge_index, 5), "method": "iterative"}
    for bound in (None, 0.9):
        found = graph_resolvent(**inputs, spectral_bound=bound)
        torch.testing.assert_close(found, graph_resolvent(**inputs, backend="reference"))


@pytest.mark.parametrize("bound", [None, 0.9], ids=["sums", "spectral"])
@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_sizes_whose_squares_are_no_numbers(bound, one_way, size):
    ring = torch.stack([torch.arange(50), torch.arange(50).roll(1)])
    ring = ring if one_way else torch.cat([ring, ring.flip(0)], dim=1)
    inputs = inputs_of(v=50, e=0, dtype=torch.float32) | {"edge_index": ring, "edges": graph_edges(ring, 50)}
    inputs |= {"edge_decay": torch.full((ring.shape[1], 2), 0.44).log(), "method": "iterative"}
    expected = run_with_gradients(
        graph_resolvent, inputs | {"method": "dense"}, ("y",), {"y": torch.ones_like(inputs["x"])}
    )
    inputs |= {"x": size * inputs["x"], "spectral_bound": bound}
    found = run_with_gradients(graph_resolvent, inputs, ("y",), {"y": torch.full_like(inputs["x"], 1 / size)})
    for name, change in (("y", 1 / size), ("dx", size), ("dB", 1), ("dC", 1)):
        assert relative_error(found[name].double() * change, expected[name].double()) < 1e-4, name


@pytest.mark.parametrize("where", ["x", "edge_decay"])
@pytest.mark.parametrize("bound", [None, 0.9], ids=["sums", "spectral"])
def test_nan_stays_in_its_graph_and_spoils_nothing_silently(where, bound):
    """Columns of states that it reaches are NaN in their whole graph, as in the dense form; all else is as without."""
    inputs = symmetric(60, torch.randint(0, 60, (2, 150)), 0.9) if bound else inputs_of(v=60, e=120)
    twice = {name: torch.cat([inputs[name]] * 2) for name in ("x", "edge_decay", "B", "C")}
    edge_index = torch.cat([inputs["edge_index"], inputs["edge_index"] + 60], dim=1)
    edges = graph_edges(edge_index, 120, ptr=torch.tensor([0, 60, 120]))
    twice |= {"edge_index": edge_index, "edges": edges, "method": "iterative", "spectral_bound": bound}
    expected = graph_resolvent(**twice)
    twice[where] = twice[where].clone()
    twice[where][(3, 1, 0) if where == "x" else (3, 1)] = float("nan")
    found = graph_resolvent(**twice)
    broken = torch.zeros_like(expected, dtype=torch.bool)
    broken[:60, 1, 0 if where == "x" else slice(None)] = True
    assert found[broken].isnan().all()
    torch.testing.assert_close(found[~broken], expected[~broken], rtol=1e-4, atol=1e-4)


def test_symmetry_is_asked_of_each_graph():
    """A symmetric graph beside another one: the same digits as alone."""
    star = torch.stack([torch.zeros(59, dtype=torch.long), torch.arange(1, 60)])
    one, other = symmetric(60, star, 0.9), inputs_of(v=40, e=80, gamma=0.5)
    edge_index = torch.cat([one["edge_index"], other["edge_index"] + 60], dim=1)
    joined = {name: torch.cat([one[name], other[name]]) for name in ("x", "edge_decay", "B", "C")}
    joined |= {"edge_index": edge_index, "edges": graph_edges(edge_index, 100, ptr=torch.tensor([0, 60, 100]))}
    options = {"method": "iterative", "tol": 1e-5, "spectral_bound": 0.9}
    found = graph_resolvent(**joined, **options)
    for graph, part in ((one, found[:60]), (other, found[60:])):
        alone = graph_resolvent(**graph | options)
        assert relative_error(part, alone) < 1e-12


def test_truncation_is_bounded_by_the_geometric_series():
    inputs = inputs_of(gamma=0.8)
    exact = graph_resolvent(**inputs, backend="reference")
    for terms in (4, 8, 16):
        found = graph_resolvent(**inputs | {"method": "series"}, terms=terms)
        bound = 0.8**terms / 0.2
        sizes = inputs["x"].abs()[..., None] * inputs["B"].abs()[:, :, None]
        worst = inputs["C"].abs()[:, :, None] * sizes.sum(0) * bound
        assert ((found - exact).abs() <= worst.sum(-1) + 1e-12).all()
    assert relative_error(graph_resolvent(**inputs | {"method": "series"}, terms=128), exact) < 1e-9


@pytest.mark.parametrize(("edges", "terms"), [([(0, 1), (1, 2), (2, 3)], 4), ([(0, 1), (1, 0), (1, 2), (2, 1)], 4)])
def test_default_terms(edges, terms):
    """Longest path plus one, or diameter plus one, rounded up to a power of two."""
    edge_index = torch.tensor(edges).T
    inputs = inputs_of(v=4, e=len(edges), gamma=0.5)
    inputs |= {"edge_index": edge_index, "edges": graph_edges(edge_index, 4), "method": "series"}
    expected = graph_resolvent(**inputs, terms=terms)
    assert torch.equal(graph_resolvent(**inputs), expected)
    assert relative_error(graph_resolvent(**inputs, terms=terms // 2), expected) > 1e-4


def test_iteration_refuses_what_does_not_contract_or_converge():
    inputs = inputs_of(gamma=1.2, method="iterative")
    with pytest.raises(ValueError, match="sum to less than 1"):
        graph_resolvent(**inputs)
    inputs = inputs_of(gamma=0.99, method="iterative")
    with pytest.raises(ConvergenceError, match="within 3 iterations"):
        graph_resolvent(**inputs | {"tol": 1e-9}, max_iter=3)


def test_iteration_by_rows_where_rows_contract():
    inputs = inputs_of(gamma=0.9, method="iterative", tol=1e-10)
    flipped = inputs["edge_index"].flip(0)  # now the sums over incoming edges are below 1
    inputs |= {"edge_index": flipped, "edges": graph_edges(flipped, 60)}
    cotangents = {"y": torch.randn_like(inputs["x"])}
    expected = run_with_gradients(lambda **kw: graph_resolvent(**kw, backend="reference"), inputs, ("y",), cotangents)
    for name, value in run_with_gradients(graph_resolvent, inputs, ("y",), cotangents).items():
        assert relative_error(value, expected[name]) < 1e-8, name


def test_no_second_derivative_by_iteration():
    inputs = inputs_of(method="iterative")
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(graph_resolvent(**inputs | {"x": x}).square().sum(), x, create_graph=False)
    assert dx.isfinite().all()
    with pytest.raises(BackendError, match="method='dense'"):
        torch.autograd.grad(graph_resolvent(**inputs | {"x": x}).square().sum(), x, create_graph=True)


def test_half_precision_is_solved_in_float32():
    inputs = inputs_of(dtype=torch.float16, gamma=0.99)
    floating = {name: x for name, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point()}
    exact = graph_resolvent(**inputs | {name: x.double() for name, x in floating.items()})
    found = graph_resolvent(**inputs)
    assert found.dtype == torch.float16
    assert relative_error(found, exact) < 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = graph_resolvent(**inputs | {name: x.float() for name, x in floating.items()})
    assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize("method", ["dense", "series", "iterative"])
def test_no_states_read_nothing(method):
    inputs = inputs_of(v=6, e=8, n=0, method=method)
    assert torch.equal(graph_resolvent(**inputs), torch.zeros_like(inputs["x"]))


def test_choice():
    ring = torch.stack([torch.arange(600), (torch.arange(600) + 1) % 600])
    assert choose_method(graph_edges(ring, 600))[0] == "iterative"
    assert choose_method(graph_edges(ring, 600, ptr=None).to("cpu"))[1].startswith("the largest graph has 600")
    pairs = torch.tensor([[0, 1], [1, 0]])
    assert choose_method(graph_edges(pairs, 1200, ptr=torch.tensor([0, 600, 1200])))[0] == "iterative"
    assert choose_method(graph_edges(pairs, 2))[0] == "dense"


def test_wrong_arguments():
    inputs = inputs_of(v=6, e=8)
    with pytest.raises(ValueError, match="method must be one of auto, dag, dense, series, iterative, got 'fast'"):
        graph_resolvent(**inputs | {"method": "fast"})
    loop = torch.tensor([[0], [0]])
    cyclic = {"edge_index": loop, "edges": graph_edges(loop, 6), "edge_decay": inputs["edge_decay"][:1]}
    with pytest.raises(ValueError, match="without cycles"):
        graph_resolvent(**inputs | cyclic | {"method": "dag"})
    with pytest.raises(TypeError, match="graph_edges"):
        graph_resolvent(**inputs | {"edges": dag_order(torch.zeros(2, 0, dtype=torch.long), 6)})
    with pytest.raises(ValueError, match="has 6 nodes and 7 edges, expected 6 and 8"):
        graph_resolvent(**inputs | {"edges": graph_edges(inputs["edge_index"][:, :7], 6)})
    with pytest.raises(ValueError, match="positive"):
        graph_resolvent(**inputs | {"tol": 0.0})
    with pytest.raises(ValueError, match="must rise from 0 to 6"):
        graph_edges(inputs["edge_index"], 6, ptr=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="two graphs"):
        graph_edges(torch.tensor([[0], [5]]), 6, ptr=torch.tensor([0, 3, 6]))
    with pytest.raises(ValueError, match="names node 6"):
        graph_edges(torch.tensor([[0], [6]]), 6)
