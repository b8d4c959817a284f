"""What ops over grids and graphs owe beside their equations: extreme steps, compilers, transforms and little memory."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from omnissm.kernels import cross_scan, dag_order, dag_scan, grid_scan
from omnissm.kernels.cross_scan.spec import make_inputs as make_cross
from omnissm.kernels.dag_scan.spec import make_inputs as make_dag
from omnissm.kernels.scan2d.spec import make_grid_inputs
from omnissm.kernels.testing import relative_error, run_with_gradients

GRIDS = {
    "cross": (cross_scan, make_cross, {}),
    "mean": (grid_scan, make_grid_inputs, {}),
    "separable": (grid_scan, make_grid_inputs, {"rule": "separable"}),
}
EVERY_GRID = pytest.mark.parametrize("kind", GRIDS)


def grid(kind, b=2, i=3, j=6, d=3, n=2):
    op, make, options = GRIDS[kind]
    generator = torch.Generator().manual_seed(0)
    return op, make(b, i, j, d, n, **options, dtype=torch.float32, device="cpu", generator=generator)


def dag(v=80, e=160, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    return make_dag(v, e, 2, 3, 4, dtype=dtype, device="cpu", generator=generator, **options)


def tensors(inputs):
    return {name: value for name, value in inputs.items() if torch.is_tensor(value)}


def some(tensor, first, second):
    """Half of the numbers one, half the other."""
    chosen = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    return torch.where(chosen, torch.full_like(tensor, first), torch.full_like(tensor, second))


def check_regime(op, inputs):
    """Outputs and gradients are finite and those of the float64 reference."""
    wide = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    cotangents = {"y": torch.randn(inputs["x"].shape)}
    expected = run_with_gradients(lambda **kw: op(**kw, backend="reference"), wide, ("y",), cotangents)
    for name, value in run_with_gradients(op, inputs, ("y",), cotangents).items():
        assert value.isfinite().all(), name
        if expected[name].any():
            assert relative_error(value, expected[name]) < 1e-5, name
        else:
            assert not value.any(), name


@EVERY_GRID
@pytest.mark.parametrize(
    ("names", "change"),
    [
        (("dt", "dt1", "dt2"), lambda dt: some(dt, 112.0, 0.04)),
        (("dt", "dt1", "dt2"), lambda dt: torch.full_like(dt, 1e-7)),
        (("dt", "dt1", "dt2"), torch.zeros_like),
        (("B", "B1", "B2"), torch.zeros_like),
        (("x",), lambda x: 1e4 * x),
    ],
    ids=["strong", "tiny steps", "no steps", "no input maps", "large values"],
)
def test_extremes_of_grids(kind, names, change):
    op, inputs = grid(kind, i=6, j=7)
    check_regime(op, {name: change(value) if name in names else value for name, value in inputs.items()})


@pytest.mark.parametrize(
    "changed",
    [
        {"edge_decay": lambda a: some(a, -112.0, -0.04)},
        {"edge_decay": lambda a: some(a, -float("inf"), -0.04)},
        {"B": torch.zeros_like},
        {"x": lambda x: 1e4 * x},
    ],
    ids=["strong", "no weight", "no input maps", "large values"],
)
def test_extremes_of_dags(changed):
    inputs = dag()
    check_regime(dag_scan, inputs | {name: change(inputs[name]) for name, change in changed.items()})


@EVERY_GRID
def test_grids_compile_once_for_rows_of_any_length(kind):
    op, _ = grid(kind)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, backend=counter, fullgraph=True, dynamic=True)
    for turn, (b, j) in enumerate(((2, 5), (3, 9), (4, 40))):
        _, inputs = grid(kind, b=b, j=j)
        if turn == 2:
            before = counter.frame_count
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs), op(**inputs))
    assert counter.frame_count == before


@EVERY_GRID
def test_grids_are_exported_for_rows_of_any_length(kind):
    op, inputs = grid(kind)
    options = {name: value for name, value in inputs.items() if not torch.is_tensor(value)}

    class Module(torch.nn.Module):
        def forward(self, given):
            return op(**given, **options)

    length = torch.export.Dim("length", min=2, max=64)
    place = {4: {2: length}, 5: {3: length}}
    shapes = {name: place.get(value.dim()) for name, value in tensors(inputs).items()}
    program = torch.export.export(Module(), (tensors(inputs),), dynamic_shapes=(shapes,))
    for j in (2, 33):
        _, other = grid(kind, j=j)
        torch.testing.assert_close(program.module()(tensors(other)), op(**other))


@EVERY_GRID
def test_grids_under_transforms(kind):
    """One sample after another, mapped values and mapped rates; gradients of each."""
    op, inputs = grid(kind)
    rates = next(name for name in inputs if name.startswith("A"))
    for name in ("x", rates):
        many = torch.stack([inputs[name], 2 * inputs[name]])

        def loss(value, name=name):
            return op(**inputs | {name: value}).square().sum()

        found = torch.func.vmap(torch.func.grad(loss))(many)
        leaf = many[1].clone().requires_grad_()
        torch.testing.assert_close(found[1], torch.autograd.grad(loss(leaf), leaf)[0])


@EVERY_GRID
def test_autocast_leaves_steps_and_rates(kind):
    """As if only x, B and C had been rounded by the caller."""
    op, inputs = grid(kind)
    with torch.autocast("cpu", torch.bfloat16):
        found = op(**inputs)
    rounded = {n: v.bfloat16().float() if n in ("x", "B", "B1", "B2", "C") else v for n, v in inputs.items()}
    assert relative_error(found, op(**rounded).double()) < 4e-3
    dag_inputs = dag()
    with torch.autocast("cpu", torch.bfloat16):
        found = dag_scan(**dag_inputs)
    rounded = {n: v.bfloat16().float() if n in ("x", "B", "C") else v for n, v in dag_inputs.items()}
    assert relative_error(found, dag_scan(**rounded).double()) < 4e-3


def test_opcheck():
    inputs = dag(12, 20, dtype=torch.float64)
    x, B, C = (inputs[name] for name in ("x", "B", "C"))
    weight, topology = inputs["edge_decay"].exp(), inputs["order"].tensors()
    for budget in (2**26, 512):
        opcheck(torch.ops.ssm.dag_scan_chunked_fwd.default, (x, weight, B, C, topology, False, budget))


def test_a_dag_beyond_the_budget_keeps_its_inputs_only():
    """States of 40 MB in blocks of at most 2 MB: what is saved and what is in use at once, forward and backward."""
    v, h, p, n, budget = 2000, 2, 8, 320, 2**21
    source = torch.randint(0, v - 200, (3000,))
    edge_index = torch.stack([source, source // 200 * 200 + torch.randint(200, 400, (3000,))])  # ten levels at most
    inputs = {"x": torch.randn(v, h, p), "edge_decay": -torch.rand(3000, h)}
    inputs |= {name: torch.randn(v, 1, n) for name in "BC"}
    leaves = [value.requires_grad_() for value in inputs.values()]
    order, saved = dag_order(edge_index, v), []
    options = {"edge_index": edge_index, "order": order, "max_state_bytes": budget}
    with torch.profiler.profile(profile_memory=True) as record:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = dag_scan(**inputs, **options)
        torch.autograd.grad(y.sum(), leaves)
    assert max(t.numel() for t in saved if t.is_floating_point()) == v * n
    sizes = [e.device_memory_usage or e.cpu_memory_usage for e in record.events() if e.name == "[memory]"]
    in_use = most = 0
    for size in sizes:
        in_use += size
        most = max(most, in_use)
    own = sum(4 * leaf.numel() for leaf in leaves)
    assert most < 4 * own + 4 * budget < 4 * v * h * p * n
