"""scan2d and selective_scan2d against their references, and against what the mathematics says of them."""

import math

import pytest
import torch
from torch.library import opcheck

from omnissm.kernels import BackendError, linear_scan, scan2d, selective_scan2d
from omnissm.kernels.scan2d import selective
from omnissm.kernels.scan2d.spec import SPEC, STATE_SPEC
from omnissm.kernels.testing import check_op, relative_error

COUPLINGS = ("full", "none", "time_to_variate", "variate_to_time")
SMALL = {"b": 4, "i": 3, "j": 4, "d": 2, "n": 3, "g": 2}


def inputs(*, dtype=torch.float64, seed=0, spec=SPEC, device="cpu", **size):
    generator = torch.Generator(device).manual_seed(seed)
    return spec.make_inputs(**size, dtype=dtype, device=device, generator=generator)


def tensors(arguments):
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("size", STATE_SPEC.test_sizes, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scan2d_matches_reference(dtype, size, device):
    check_op(STATE_SPEC, size, "chunked", dtype, device)


@pytest.mark.parametrize("size", SPEC.test_sizes, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_selective_matches_reference(dtype, size, device):
    check_op(SPEC, size, "chunked", dtype, device)


@pytest.mark.parametrize("held", ["euler", "zoh"])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("gap", [False, True], ids=["regular", "gaps"])
def test_every_coupling_and_input_term(coupling, held, gap, device):
    size = {"b": 4, "i": 4, "j": 5, "d": 3, "n": 2, "g": 2, "gap": gap}
    check_op(SPEC, size, "chunked", torch.float64, device, coupling=coupling, input_discretization=held)


@pytest.mark.parametrize(("diagonal", "block"), [(1, 1 << 25), (12, 1 << 25), (40, 1 << 25), (1 << 20, 30)])
def test_blocks_of_any_size_agree(diagonal, block, device, monkeypatch):
    monkeypatch.setattr(selective, "CPU_DIAGONAL", diagonal)
    monkeypatch.setattr(selective, "DEVICE_DIAGONAL", diagonal)
    monkeypatch.setattr(selective, "BLOCK", block)
    size = {"b": 6, "i": 3, "j": 5, "d": 5, "n": 2, "g": 2, "gap": True}
    check_op(SPEC, size, "chunked", torch.float64, device, input_discretization="zoh")


def test_gradcheck_scan2d():
    arguments = inputs(spec=STATE_SPEC, b=1, i=2, j=3, d=2, n=2)
    leaves = [value.requires_grad_() for value in arguments.values()]
    assert torch.autograd.gradcheck(lambda *args: scan2d(*args, backend="chunked"), leaves)


@pytest.mark.parametrize("held", ["euler", "zoh"])
def test_gradcheck_selective(held):
    arguments = inputs(b=2, i=2, j=3, d=2, n=2, g=1, gap=True, input_discretization=held)
    leaves = {name: value.requires_grad_() for name, value in tensors(arguments).items()}

    def call(*values):
        return selective_scan2d(**arguments | dict(zip(leaves, values)), backend="chunked")

    assert torch.autograd.gradcheck(call, list(leaves.values()))


def test_reference_has_second_derivatives_and_chunked_names_it():
    arguments = inputs(b=1, i=2, j=2, d=1, n=1)
    x = arguments.pop("x").requires_grad_()

    def curvature(backend):
        y = selective_scan2d(x, **arguments, backend=backend)
        (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.sum(), x)[0]

    assert curvature("reference").isfinite().all()
    with pytest.raises(BackendError, match="backend='reference'"):
        curvature("chunked")


def rearranged(value):
    """The same numbers with the dimensions in another order in memory."""
    order = list(range(value.dim()))[::-1]
    return value.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("spec", [STATE_SPEC, SPEC], ids=lambda spec: spec.name)
def test_strides_do_not_matter(spec, device):
    size = {"b": 2, "i": 3, "j": 4, "d": 3, "n": 2}
    arguments = inputs(spec=spec, device=device, **size)
    options = {name: value for name, value in arguments.items() if not isinstance(value, torch.Tensor)}
    results = []
    for change in (lambda value: value, rearranged, lambda value: value.repeat_interleave(2, dim=1)[:, ::2]):
        leaves = {name: change(value).detach().requires_grad_() for name, value in tensors(arguments).items()}
        out = spec.op(**leaves, **options, backend="chunked")
        total = sum((part**2).sum() for part in (out if isinstance(out, tuple) else (out,)))
        results.append((total, *torch.autograd.grad(total, leaves.values())))
    for other in results[1:]:
        for value, expected in zip(other, results[0]):
            torch.testing.assert_close(value, expected)


def test_expanded_inputs(device):
    arguments = inputs(device=device, **SMALL)
    expected = selective_scan2d(**arguments | {"dt1": arguments["dt1"][:, :1, :1].repeat(1, 3, 4, 1)})
    got = selective_scan2d(**arguments | {"dt1": arguments["dt1"][:, :1, :1].expand(-1, 3, 4, -1)})
    torch.testing.assert_close(got, expected)


def test_row_with_odd_strides(device):
    # One row whose stride (1 element) says nothing: the views along diagonals must not rely on it.
    arguments = inputs(device=device, b=2, i=1, j=5, d=3, n=2)
    expected = selective_scan2d(**arguments)
    odd = arguments["x"].as_strided((2, 1, 5, 3), (15, 1, 3, 1))
    torch.testing.assert_close(selective_scan2d(**arguments | {"x": odd}), expected)


def test_inputs_are_left_alone(device):
    arguments = inputs(device=device, **SMALL)
    before = {name: value.clone() for name, value in tensors(arguments).items()}
    leaves = {name: value.requires_grad_() for name, value in tensors(arguments).items()}
    selective_scan2d(**arguments | leaves, backend="chunked").sum().backward()
    for name, value in before.items():
        assert torch.equal(leaves[name], value), name


def test_two_runs_are_bit_equal(device):
    arguments = inputs(dtype=torch.float32, device=device, b=8, i=7, j=12, d=16, n=4, g=2)

    def run():
        leaves = {name: value.clone().requires_grad_() for name, value in tensors(arguments).items()}
        y = selective_scan2d(**arguments | leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves.values())]

    assert all(torch.equal(one, two) for one, two in zip(run(), run()))


# Special cases


def test_one_variate_without_coupling_is_the_selective_scan(device):
    arguments = inputs(device=device, b=2, i=1, j=9, d=3, n=4, coupling="none")
    arguments["C2"] = torch.zeros_like(arguments["C2"])
    x, dt, alpha = arguments["x"][:, 0], arguments["dt1"][:, 0], arguments["A1_log"][0].exp()  # Mamba's A = -alpha
    a = torch.exp(-dt[..., None] * alpha)
    b = dt[..., None] * arguments["B1"][:, 0, :, None] * x[..., None]
    h, _ = linear_scan(a.flatten(2), b.flatten(2))
    y = (h.view_as(b) * arguments["C1"][:, 0, :, None]).sum(-1) + arguments["D"][0] * x
    torch.testing.assert_close(selective_scan2d(**arguments)[:, 0], y)


def test_no_coupling_is_a_scan_along_each_axis(device):
    arguments = inputs(spec=STATE_SPEC, device=device, b=2, i=4, j=6, d=3, n=2)
    arguments["a2"], arguments["a3"] = torch.zeros_like(arguments["a2"]), torch.zeros_like(arguments["a3"])
    h1, h2 = scan2d(**arguments)
    along_time, _ = linear_scan(arguments["a1"].flatten(0, 1).flatten(2), arguments["b1"].flatten(0, 1).flatten(2))
    torch.testing.assert_close(h1.flatten(0, 1).flatten(2), along_time)
    a4, b2 = (arguments[name].transpose(1, 2).flatten(0, 1).flatten(2) for name in ("a4", "b2"))
    torch.testing.assert_close(h2.transpose(1, 2).flatten(0, 1).flatten(2), linear_scan(a4, b2)[0])


def test_scalar_transitions_broadcast(device):
    arguments = inputs(spec=STATE_SPEC, device=device, b=2, i=3, j=5, d=3, n=4)
    scalars = {name: arguments[name][..., :1, :1] for name in ("a1", "a2", "a3", "a4")}
    spread = {name: value.expand(2, 3, 5, 3, 4).clone() for name, value in scalars.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in scalars.items()}
    wide = {name: value.requires_grad_() for name, value in spread.items()}
    total = sum(h.square().sum() for h in scan2d(**arguments | leaves))
    expected = sum(h.square().sum() for h in scan2d(**arguments | wide))
    torch.testing.assert_close(total, expected)
    for narrow, full in zip(torch.autograd.grad(total, leaves.values()), torch.autograd.grad(expected, wide.values())):
        torch.testing.assert_close(narrow, full.sum((-1, -2), keepdim=True))


def test_impulse_counts_lattice_paths(device):
    # With all transitions equal to c both states hold c^(i+j) times a number of monotone paths from the corner.
    rows, columns, c = 4, 5, 0.4
    a = torch.full((1, rows, columns, 1, 1), c, dtype=torch.float64, device=device)
    impulse = torch.zeros_like(a)
    impulse[0, 0, 0] = 1.0
    h1, h2 = scan2d(a, a, a, a, impulse, torch.zeros_like(a))
    # h1 + h2 =: t obeys h1[i,j] = c t[i,j-1], h2[i,j] = c t[i-1,j]: t counts all paths to (i, j).
    for i in range(rows):
        for j in range(columns):
            expected = c ** (i + j) * math.comb(i + j, i)
            assert (h1 + h2)[0, i, j, 0, 0].item() == pytest.approx(expected, rel=1e-12)


def test_states_stay_bounded(device):
    kappa, shape = 0.9, (1, 40, 60, 1, 4)
    generator = torch.Generator(device).manual_seed(0)
    like = {"dtype": torch.float64, "device": device, "generator": generator}
    a1, a4 = (torch.exp(-(10 ** (-3 * torch.rand(shape, **like)))) for _ in range(2))  # steps 0.001 to 1
    a2, a3 = kappa * (1 - a1), kappa * (1 - a4)  # the strongest coupling, all of one sign
    b1, b2 = (
        torch.ones(shape, dtype=torch.float64, device=device),
        torch.ones(shape, dtype=torch.float64, device=device),
    )
    slowest = min((1 - a1).min().item(), (1 - a4).min().item())
    bound = 1.01 / ((1 - kappa) * slowest)
    h1, h2 = scan2d(a1, a2, a3, a4, b1, b2)
    assert max(h1.abs().max().item(), h2.abs().max().item()) <= bound


def test_causal_in_both_axes(device):
    arguments = inputs(device=device, b=1, i=4, j=5, d=2, n=2)
    x = arguments["x"].requires_grad_()
    (dx,) = torch.autograd.grad(selective_scan2d(**arguments, backend="chunked")[0, 2, 3].sum(), x)
    reached = dx[0].abs().sum(-1) > 0
    expected = torch.zeros(4, 5, dtype=torch.bool, device=device)
    expected[:3, :4] = True
    assert torch.equal(reached, expected)


def test_groups_are_independent_instances(device):
    arguments = inputs(device=device, b=6, i=3, j=4, d=2, n=3, g=3, gap=True)
    y = selective_scan2d(**arguments)
    for group in range(3):
        rows = slice(2 * group, 2 * group + 2)
        alone = {
            name: value[group : group + 1] if name in ("A1_log", "A4_log", "theta2", "theta3", "D") else value[rows]
            for name, value in tensors(arguments).items()
            if name != "time_gap"
        }
        torch.testing.assert_close(selective_scan2d(**alone, time_gap=arguments["time_gap"]), y[rows])


def test_a_gap_equals_steps_without_input(device):
    gap = 4
    arguments = inputs(device=device, b=1, i=2, j=3, d=2, n=3, coupling="none")
    for name in ("dt1", "dt2"):
        arguments[name] = arguments[name][:, :, :1].expand(-1, -1, 3, -1).clone()
    gaps = torch.ones(1, 3, dtype=torch.float64, device=device)
    gaps[0, 2] = gap
    y = selective_scan2d(**arguments, time_gap=gaps)

    def with_silence(value):  # gap - 1 empty steps before the last one
        return torch.cat([value[:, :, :2], value[:, :, 2:].expand(-1, -1, gap, *[-1] * (value.dim() - 3))], dim=2)

    longer = {name: with_silence(value) if value.dim() == 4 else value for name, value in tensors(arguments).items()}
    longer["x"] = longer["x"].clone()
    longer["x"][:, :, 2 : 1 + gap] = 0
    expected = selective_scan2d(**longer, coupling="none")
    torch.testing.assert_close(y[:, :, 2], expected[:, :, -1], rtol=1e-12, atol=1e-12)


def test_no_step_is_a_no_op(device):
    # dt = 0 at a column: nothing decays, nothing enters, and h1 passes on unchanged.
    arguments = inputs(device=device, b=1, i=1, j=4, d=2, n=2, coupling="none")
    arguments["dt1"][:, :, 2] = 0
    arguments["dt2"][:, :, 2] = 0
    y = selective_scan2d(**arguments)
    shorter = {
        name: value[:, :, [0, 1, 3]] if value.dim() == 4 else value for name, value in tensors(arguments).items()
    }
    torch.testing.assert_close(y[:, :, 3], selective_scan2d(**shorter, coupling="none")[:, :, 2])


def test_tiny_steps_keep_their_precision(device):
    arguments = inputs(dtype=torch.float32, device=device, b=1, i=3, j=50, d=2, n=2)
    arguments["dt1"], arguments["dt2"] = arguments["dt1"] * 1e-6, arguments["dt2"] * 1e-6
    arguments["D"] = torch.zeros_like(arguments["D"])
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    assert relative_error(selective_scan2d(**arguments), selective_scan2d(**wide, backend="reference")) < 1e-6


def test_held_input_equals_the_exact_solution(device):
    # One cell: the state after holding x for dt is (1 - exp(-dt alpha)) / alpha B x.
    arguments = inputs(device=device, b=1, i=1, j=1, d=1, n=1, input_discretization="zoh")
    scalar = {name: value.item() for name, value in tensors(arguments).items()}

    def state(dt, log_rate, weight):
        rate = math.exp(log_rate)
        return -math.expm1(-dt * rate) / rate * weight * scalar["x"]

    expected = (
        scalar["C1"] * state(scalar["dt1"], scalar["A1_log"], scalar["B1"])
        + scalar["C2"] * state(scalar["dt2"], scalar["A4_log"], scalar["B2"])
        + scalar["D"] * scalar["x"]
    )
    assert selective_scan2d(**arguments).item() == pytest.approx(expected, rel=1e-12)


# dtypes, tracing


def test_half_precision_stays_float32_inside(device):
    arguments = inputs(dtype=torch.float32, device=device, b=2, i=7, j=200, d=4, n=4)
    arguments["dt1"] = arguments["dt1"] * 1e-2  # long memory: a bfloat16 state would drift
    rounded = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in rounded.items()}
    y = selective_scan2d(**rounded)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, selective_scan2d(**wide, backend="reference")) < 3e-3  # rounding of y alone: 1.7e-3


def test_autocast_changes_nothing(device):
    arguments = inputs(dtype=torch.float32, device=device, **SMALL)
    expected = selective_scan2d(**arguments)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = selective_scan2d(**arguments)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_opcheck():
    arguments = inputs(b=2, i=2, j=3, d=2, n=2, g=2)
    x, dt1, dt2 = (arguments[name].requires_grad_() for name in ("x", "dt1", "dt2"))
    B1, B2, C1, C2 = (arguments[name] for name in ("B1", "B2", "C1", "C2"))
    alpha, c = arguments["A1_log"].exp(), arguments["theta2"].tanh()
    for c3, held in ((c, False), (None, True)):
        values = (x, dt1, dt2, None, B1, B2, C1, C2, alpha, alpha, c, c3, held)
        opcheck(torch.ops.ssm.selective_scan2d_fwd.default, values)
    states = tuple(value.requires_grad_() for value in inputs(spec=STATE_SPEC, b=1, i=2, j=3, d=2, n=2).values())
    opcheck(torch.ops.ssm.scan2d_fwd.default, states)


def test_export_with_dynamic_length():
    class Module(torch.nn.Module):
        def forward(self, arguments):
            return selective_scan2d(**arguments)

    given = tensors(inputs(dtype=torch.float32, **SMALL))
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {name: {2: length} if value.dim() == 4 else None for name, value in given.items()}
    program = torch.export.export(Module(), (given,), dynamic_shapes=(shapes,))
    longer = tensors(inputs(dtype=torch.float32, **SMALL | {"j": 9}))
    torch.testing.assert_close(program.module()(longer), selective_scan2d(**longer))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(compiler):
    given = tensors(inputs(dtype=torch.float32, **SMALL))
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    y = torch.compile(selective_scan2d, fullgraph=True, backend=compiler)(**leaves)
    gradients = torch.autograd.grad(y.sum(), leaves.values())
    plain = {name: value.clone().requires_grad_() for name, value in given.items()}
    expected = selective_scan2d(**plain)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), plain.values()))


def test_forward_keeps_no_states():
    arguments = inputs(dtype=torch.float32, b=2, i=6, j=50, d=4, n=16)
    leaves = {name: value.requires_grad_() for name, value in tensors(arguments).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        selective_scan2d(**arguments | leaves)
    assert max(saved) <= 2 * 6 * 50 * 16  # the projections; a state would have d = 4 times that


# What is refused


def test_wrong_shapes_are_named():
    arguments = inputs(b=4, i=3, j=4, d=2, n=3, g=2)
    with pytest.raises(ValueError, match=r"`B1` has n=5, expected 3 \(from `A1_log`\)"):
        selective_scan2d(**arguments | {"B1": torch.zeros(4, 3, 4, 5, dtype=torch.float64)})
    with pytest.raises(ValueError, match="b=3, which must be a multiple of the g=2"):
        selective_scan2d(
            **arguments | {name: arguments[name][:3] for name in ("x", "dt1", "dt2", "B1", "B2", "C1", "C2")}
        )
    with pytest.raises(ValueError, match="`time_gap` has 3 rows, expected b=4 or batch=2"):
        selective_scan2d(**arguments, time_gap=torch.ones(3, 4, dtype=torch.float64))
    states = inputs(spec=STATE_SPEC, b=1, i=2, j=2, d=2, n=2)
    with pytest.raises(ValueError, match="`b2` has j=3"):
        scan2d(**states | {"b2": torch.zeros(1, 2, 3, 2, 2)})


@pytest.mark.parametrize("empty", [{"i": 0}, {"j": 0}], ids=str)
@pytest.mark.parametrize("spec", [STATE_SPEC, SPEC], ids=lambda spec: spec.name)
def test_an_empty_grid_is_refused(spec, empty):
    size = {"b": 2, "i": 3, "j": 3, "d": 2, "n": 2} | empty
    with pytest.raises(ValueError, match="at least one variate and one time step"):
        spec.op(**inputs(spec=spec, **size))


@pytest.mark.parametrize("empty", [{"b": 0}, {"d": 0}, {"b": 0, "gap": True}], ids=str)
def test_empty_batch_or_channels(empty):
    arguments = inputs(**{"b": 2, "i": 3, "j": 3, "d": 2, "n": 2} | empty)
    x = arguments["x"].requires_grad_()
    y = selective_scan2d(**arguments)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_unknown_options_are_named():
    arguments = inputs(**SMALL)
    with pytest.raises(ValueError, match=r"`coupling` must be one of 'full', 'none'.*got 'both'"):
        selective_scan2d(**arguments | {"coupling": "both"})
    with pytest.raises(ValueError, match="`input_discretization` must be one of 'euler', 'zoh'"):
        selective_scan2d(**arguments | {"input_discretization": "tustin"})
    with pytest.raises(ValueError, match=r"`kappa` must lie in \[0, 1\]"):
        selective_scan2d(**arguments, kappa=1.5)
    with pytest.raises(TypeError, match=r"`x` must have a floating dtype, got torch\.int64"):
        selective_scan2d(**arguments | {"x": torch.zeros(4, 3, 4, 2, dtype=torch.int64)})


def test_triton_is_refused_with_the_reason():
    """The states of a whole grid are the output: a kernel that keeps them in registers has nothing to save."""
    arguments = inputs(spec=STATE_SPEC, b=1, i=2, j=2, d=1, n=1)
    with pytest.raises(BackendError, match="scan2d has no triton implementation"):
        STATE_SPEC.op(**arguments, backend="triton")
