"""dag_scan against dense masks, other scans and plain loops; and the order it walks in."""

import pytest
import torch

from omnissm.kernels import DagOrder, available_backends, dag_order, dag_scan, ssd
from omnissm.kernels.dag_scan.spec import make_inputs
from omnissm.kernels.testing import relative_error, run_with_gradients


def inputs_of(v, e, dtype=torch.float64, seed=0, **options):
    sizes = {"h": 2, "p": 3, "n": 4} | options
    generator = torch.Generator().manual_seed(seed)
    return make_inputs(v, e, **sizes, dtype=dtype, device="cpu", generator=generator)


def dense(x, edge_decay, B, C, edge_index, order, reverse=False, signed=False, max_state_bytes=0):
    """y = ((I - A)^{-1} * (C B^T)) x, one dense matrix per head."""
    nodes, heads = x.shape[:2]
    weight = edge_decay if signed else edge_decay.exp()
    A = x.new_zeros(heads, nodes, nodes)
    source, target = edge_index.flip(0) if reverse else edge_index
    head = torch.arange(heads, device=x.device)[:, None]
    A = A.index_put((head, target[None], source[None]), weight.T, accumulate=True)
    mask = torch.linalg.inv(torch.eye(nodes, dtype=x.dtype, device=x.device) - A)
    B, C = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (B, C))
    kernel = torch.einsum("ihn,jhn->hij", C, B)
    return torch.einsum("hij,jhp->ihp", mask * kernel, x)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("v", "e"), [(1, 0), (2, 1), (63, 100), (64, 0), (257, 500)])
def test_equals_the_dense_mask(v, e, reverse):
    inputs = inputs_of(v, e, reverse=reverse)
    cotangents = {"y": torch.randn_like(inputs["x"])}
    expected = run_with_gradients(dense, inputs, ("y",), cotangents)
    for budget in (2**26, 4096):
        found = run_with_gradients(dag_scan, inputs | {"max_state_bytes": budget}, ("y",), cotangents)
        for name, value in found.items():
            assert relative_error(value, expected[name]) < 1e-10, name


@pytest.mark.parametrize("budget", [2**26, 2048])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("schedule", ["nodes", "levels", "graphs"])
def test_all_schedules_equal_the_dense_mask(schedule, reverse, budget, device, monkeypatch):
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)
    from omnissm.kernels.dag_scan import triton_impl

    monkeypatch.setattr(triton_impl, "_STEPS_OF_A_LAUNCH", 10**6 if schedule == "graphs" else 0)
    monkeypatch.setattr(triton_impl, "_LARGE", 0 if schedule == "levels" else 2**23)
    inputs = inputs_of(13, 20, reverse=reverse, g=2, max_state_bytes=budget)
    order = inputs["order"]
    both = torch.cat([inputs["edge_index"], inputs["edge_index"] + 13], dim=1)
    batch = torch.arange(2).repeat_interleave(13)
    assert order.graph_ptr.tolist() == [0, 13]
    assert int(order.largest) == 33
    twice = {name: torch.cat([inputs[name], inputs[name].roll(1, 0)]) for name in ("x", "edge_decay", "B", "C")}
    inputs |= twice | {"edge_index": both, "order": dag_order(both, 26, batch=batch)}
    assert inputs["order"].graph_ptr.tolist() == [0, 13, 26]
    inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()}
    cotangents = {"y": torch.randn_like(inputs["x"])}
    expected = run_with_gradients(dense, inputs, ("y",), cotangents)
    found = run_with_gradients(lambda **kw: dag_scan(**kw, backend="triton"), inputs, ("y",), cotangents)
    for name, value in found.items():
        assert relative_error(value, expected[name]) < 1e-10, name


def test_a_node_with_two_hundred_parents_and_parallel_edges():
    source = torch.cat([torch.arange(200), torch.tensor([0, 0, 200])])
    target = torch.cat([torch.full((200,), 200), torch.tensor([200, 200, 201])])
    edge_index = torch.stack([source, target])
    inputs = inputs_of(202, 0, h=1) | {"edge_index": edge_index, "order": dag_order(edge_index, 202)}
    inputs["edge_decay"] = torch.linspace(-2, 0, 203, dtype=torch.float64)[:, None]
    cotangents = {"y": torch.randn_like(inputs["x"])}
    expected = run_with_gradients(dense, inputs, ("y",), cotangents)
    for name, value in run_with_gradients(dag_scan, inputs, ("y",), cotangents).items():
        assert relative_error(value, expected[name]) < 1e-10, name


def test_a_path_is_ssd():
    length = 50
    edge_index = torch.stack([torch.arange(length - 1), torch.arange(1, length)])
    order = dag_order(edge_index, length)
    assert order.kind == "chains"
    inputs = inputs_of(length, 0)
    log_decay = -torch.rand(length, 2, dtype=torch.float64)
    y, _ = ssd(inputs["x"][None], log_decay[None], inputs["B"][None], inputs["C"][None])
    found = dag_scan(inputs["x"], log_decay[1:], inputs["B"], inputs["C"], edge_index, order)
    assert relative_error(found, y[0]) < 1e-12
    y, _ = ssd(
        *(inputs["x"].flip(0)[None], log_decay.flip(0)[None], inputs["B"].flip(0)[None], inputs["C"].flip(0)[None])
    )
    found = dag_scan(inputs["x"], log_decay[:-1], inputs["B"], inputs["C"], edge_index, order, reverse=True)
    assert relative_error(found, y[0].flip(0)) < 1e-12


@pytest.mark.parametrize("reverse", [False, True])
def test_long_chains_are_scanned_as_sequences(reverse):
    lengths = (90, 1, 70)
    names = torch.randperm(161, generator=torch.Generator().manual_seed(0))
    lines = [line for line in names.split(lengths) if len(line) > 1]
    edge_index = torch.cat([torch.stack([line[:-1], line[1:]]) for line in lines], dim=1)
    inputs = inputs_of(161, 0) | {"edge_index": edge_index, "order": dag_order(edge_index, 161), "reverse": reverse}
    inputs["edge_decay"] = -torch.rand(edge_index.shape[1], 2, dtype=torch.float64)
    cotangents = {"y": torch.randn_like(inputs["x"])}
    expected = run_with_gradients(dense, inputs, ("y",), cotangents)
    for name, value in run_with_gradients(dag_scan, inputs, ("y",), cotangents).items():
        assert relative_error(value, expected[name]) < 1e-10, name


def test_levels_of_a_deep_graph():
    chain = torch.arange(300)
    edge_index = torch.cat([torch.stack([chain[:-1], chain[1:]]), torch.tensor([[3, 100], [200, 299]])], dim=1)
    assert dag_order(edge_index, 300).perm.tolist() == chain.tolist()
    with pytest.raises(ValueError, match=r"cycle: nodes (150 -> 151|151 -> 150)"):
        dag_order(torch.cat([edge_index, torch.tensor([[151], [150]])], dim=1), 300)


def test_gradients_by_differences():
    """Every number by every other, on 6 nodes and 8 edges."""
    inputs = inputs_of(6, 8, p=2, n=2)
    leaves = [inputs[name].requires_grad_() for name in ("x", "edge_decay", "B", "C")]
    graph = {name: inputs[name] for name in ("edge_index", "order")}
    for budget in (2**26, 64):
        assert torch.autograd.gradcheck(lambda *a, m=budget: dag_scan(*a, **graph, max_state_bytes=m), leaves)


def test_names_of_nodes_and_order_of_edges_do_not_matter():
    inputs = inputs_of(40, 80, dtype=torch.float32)
    edge_index = inputs["edge_index"].unique(dim=1)  # parallel edges are added in the order in which they are given
    count = edge_index.shape[1]
    inputs |= {"edge_index": edge_index, "edge_decay": inputs["edge_decay"][:count], "order": dag_order(edge_index, 40)}
    y = dag_scan(**inputs)
    shuffled = torch.randperm(count)
    edge_index = inputs["edge_index"][:, shuffled]
    again = inputs | {"edge_index": edge_index, "edge_decay": inputs["edge_decay"][shuffled]}
    y_edges = dag_scan(**again | {"order": dag_order(edge_index, 40)})
    assert torch.equal(y_edges, y)
    names = torch.randperm(40)  # old name -> new name
    renamed = names[inputs["edge_index"]]
    again = {name: torch.empty_like(inputs[name]).index_copy(0, names, inputs[name]) for name in ("x", "B", "C")}
    y_names = dag_scan(**inputs | again | {"edge_index": renamed, "order": dag_order(renamed, 40)})
    assert relative_error(y_names[names], y.double()) < 1e-6


def test_a_batch_is_its_graphs_one_by_one():
    graphs = [inputs_of(v, e, seed=v) for v, e in ((1, 0), (7, 9), (30, 60), (2, 1))]
    separate = torch.cat([dag_scan(**graph) for graph in graphs])
    offsets = torch.tensor([0, 1, 8, 38])
    edge_index = torch.cat([graph["edge_index"] + offset for graph, offset in zip(graphs, offsets)], dim=1)
    batch = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 7, 30, 2]))
    joined = {name: torch.cat([graph[name] for graph in graphs]) for name in ("x", "edge_decay", "B", "C")}
    order = dag_order(edge_index, 40, batch=batch)
    torch.testing.assert_close(dag_scan(**joined, edge_index=edge_index, order=order), separate)


def test_order():
    inputs = inputs_of(100, 300)
    order, (source, target) = inputs["order"], inputs["edge_index"]
    level = [0] * 100
    for _ in range(100):
        for u, v in zip(source.tolist(), target.tolist()):
            level[v] = max(level[v], level[u] + 1)
    starts = order.level_ptr.tolist()
    assert order.num_levels == max(level) + 1
    for depth in range(order.num_levels):
        assert order.perm[starts[depth] : starts[depth + 1]].tolist() == [v for v in range(100) if level[v] == depth]
    assert torch.equal(order.perm[order.inverse], torch.arange(100))
    assert torch.equal(order.perm[order.src], source[order.edge_perm])
    assert torch.equal(order.perm[order.dst], target[order.edge_perm])
    assert order.row_ptr[-1] == order.edge_ptr[-1] == order.out_ptr[-1] == 300


@pytest.mark.parametrize(
    ("edges", "kind"),
    [
        ([], "empty"),
        ([(0, 1), (2, 3)], "chains"),
        ([(0, 1), (0, 2)], "out_forest"),
        ([(0, 2), (1, 2)], "in_forest"),
        ([(0, 2), (1, 2), (0, 3)], "dag"),
    ],
)
def test_kind(edges, kind):
    assert dag_order(torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T, 4).kind == kind


def test_compiles_whole_for_every_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x, edge_decay, B, C, edge_index, order):
        return dag_scan(x * 2, edge_decay, B, C, edge_index, order).sum(-1)

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    names = ("x", "edge_decay", "B", "C", "edge_index", "order")
    for v, e in ((9, 12), (20, 30), (33, 70)):
        inputs = {name: inputs_of(v, e, seed=v)[name] for name in names}
        cotangents = {"y": torch.randn(v, 2, dtype=torch.float64)}
        expected = run_with_gradients(layer, inputs, ("y",), cotangents)
        for name, value in run_with_gradients(compiled, inputs, ("y",), cotangents).items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("edges", "batch", "message"),
    [
        (
            [(0, 1), (1, 2), (2, 0), (2, 3)],
            None,
            r"cycle: nodes (0 -> 1 -> 2 -> 0|1 -> 2 -> 0 -> 1|2 -> 0 -> 1 -> 2); 4 ",
        ),
        ([(0, 1), (3, 2), (2, 3)], [0, 0, 1, 1], "of graph 1; 2 nodes"),
        ([(0, 1), (1, 1)], None, "self loop at node 1"),
        ([(0, 4)], None, "names node 4, expected ids from 0 to 3"),
        ([(0, -1)], None, "names node -1"),
        ([(0, 1), (1, 2)], [0, 0, 1, 1], "Edge 1 joins node 1 of graph 0 and node 2 of graph 1"),
    ],
)
def test_wrong_graphs(edges, batch, message):
    batch = None if batch is None else torch.tensor(batch)
    with pytest.raises(ValueError, match=message):
        dag_order(torch.tensor(edges).T, 4, batch=batch)


def test_long_cycle_is_cut_short():
    ring = torch.stack([torch.arange(100), (torch.arange(100) + 1) % 100])
    with pytest.raises(ValueError, match=r"nodes (\d+ -> ){8}\.\.\.; 100 nodes"):
        dag_order(ring, 100)


def test_no_states_read_nothing():
    inputs = inputs_of(6, 8, n=0)
    assert torch.equal(dag_scan(**inputs), torch.zeros_like(inputs["x"]))


def test_wrong_arguments():
    inputs = inputs_of(6, 8)
    with pytest.raises(TypeError, match="dag_order"):
        dag_scan(**inputs | {"order": inputs["edge_index"]})
    with pytest.raises(ValueError, match="has 5 nodes and 0 edges, expected 6 and 8"):
        dag_scan(**inputs | {"order": dag_order(inputs["edge_index"][:, :0], 5)})
    with pytest.raises(TypeError, match="integer"):
        dag_order(torch.zeros(2, 3), 3)
    with pytest.raises(ValueError, match=r"shape \(2, e\), got \(3, 2\)"):
        dag_order(torch.zeros(3, 2, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="divisor of h=2"):
        dag_scan(**inputs | {"B": inputs["B"].repeat(1, 3, 1), "C": inputs["C"].repeat(1, 3, 1)})


def test_order_moves_between_devices():
    order = inputs_of(6, 8)["order"].to("meta")
    assert isinstance(order, DagOrder)
    assert order.perm.device.type == "meta"
    assert order.level_ptr.device.type == "cpu"
