"""`trapezoid_ssd` and `trapezoid_step`: golden numbers, special cases, cuts, packing, numerics, torch's transforms."""

import math

import pytest
import torch
from torch.nn import functional as F

from omnissm.kernels import (
    BackendError,
    TrapezoidState,
    available_backends,
    ssd,
    trapezoid_ssd,
    trapezoid_step,
    trapezoid_step_,
)
from omnissm.kernels.testing import check_op, relative_error, run_with_gradients
from omnissm.kernels.trapezoid_ssd.spec import SPEC, make_inputs
from omnissm.kernels.trapezoid_ssd.spec import trapezoid_ssd as flat
from omnissm.kernels.trapezoid_ssd.state import rotate, spin

PATHS = pytest.mark.parametrize("path", ["reference", "chunked", "triton"])
ALONG = ("x", "log_decay", "gamma", "beta", "theta", "B", "C", "seq_idx")
STATE = ("phi", "ssm", "k", "v")


def inputs_of(device, b=2, l=10, h=2, p=3, n=4, r=1, g=1, dtype=torch.float32, seed=0, **options):  # noqa: E741
    generator = torch.Generator(device).manual_seed(seed)
    return make_inputs(b, l, h, p, n, r, g, dtype=dtype, device=device, generator=generator, **options)


def part_of(inputs, start, stop):
    """The positions start .. stop of every tensor that has positions."""
    return {name: value[:, start:stop] if name in ALONG else value for name, value in inputs.items()}


def without_state(inputs):
    return {name: value for name, value in inputs.items() if name not in STATE}


def det(seed, *shape):
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.7 * index + 1.3 * seed + 0.1).sin().reshape(shape)


def golden_inputs(r, device):
    heavy = det(3, 1, 5, 2)
    rate = torch.where(heavy >= 0, 1 + heavy, 1 / (1 - heavy.clamp(max=0)))
    dt, lam = F.softplus(det(2, 1, 5, 2)), det(6, 1, 5, 2).sigmoid()
    inputs = {
        "x": det(1, 1, 5, 2, 2),
        "log_decay": -dt * rate,
        "gamma": lam * dt,
        "beta": (1 - lam) * dt,
        "theta": det(7, 1, 5, 1),
        "B": det(4, 1, 5, r, 1, 4),
        "C": det(5, 1, 5, r, 1, 4),
        "B_bias": det(8, 2, r, 4),
        "C_bias": det(9, 2, r, 4),
        "D": det(10, 2),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def close(value, expected):
    torch.testing.assert_close(value.flatten().cpu(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


@PATHS
def test_golden_numbers_of_one_rank(path, device):
    y, (phi, ssm, k, _) = trapezoid_ssd(**golden_inputs(1, device), chunk_size=2, backend=path)
    close(y.sum(), [5.540376389])
    close(y[0, -1], [0.189722811, 1.384470630, 0.861504024, 0.751002072])
    close(phi, [1.215725220, 0.341939469])
    close(ssm.sum(), [-2.084937930])
    close(k[0, 0, 0], [1.299523957, -2.179204680, -1.431294224, -0.213350615])


@PATHS
def test_golden_row_of_the_matrix(path, device):
    """The last row of M for head 0, from unit inputs."""
    inputs = golden_inputs(1, device)
    row = []
    for s in range(5):
        inputs["x"] = torch.zeros(1, 5, 2, 2, dtype=torch.float64, device=device)
        inputs["x"][0, s] = 1
        row.append(trapezoid_ssd(**inputs, backend=path)[0][0, -1, 0, 0, 0])
    close(torch.stack(row), [0.088233441, -0.016359580, 0.014504616, -0.045963634, 1.848152711])


@PATHS
def test_golden_numbers_of_two_ranks(path, device):
    inputs = golden_inputs(2, device) | {"x_rank": det(11, 2, 2, 2).to(device), "rotation": "half"}
    y, state = trapezoid_ssd(**inputs, chunk_size=3, backend=path)
    close(y.sum(), [-7.178415224])
    close(state.ssm.sum(), [2.014490772])
    z, mimo_z, mimo_o = det(14, 1, 5, 2, 2), det(12, 2, 2, 2).transpose(0, 1), det(13, 2, 2, 2).transpose(0, 1)
    y = y.cpu()
    out = (mimo_o * y * F.silu(z[:, :, None] * mimo_z)).sum(2)
    close(out.sum(), [-1.333788169])
    close(out[0, -1], [0.047134231, -0.727519840, -0.352762800, -0.051033600])


@PATHS
def test_without_trapezoid_and_rotation_is_ssd(path, device):
    """beta = 0 (lam = 1) and theta = 0: outputs, state and gradients are those of `ssd`."""
    inputs = inputs_of(device, l=40, h=4, g=2, n=8, dtype=torch.float64, parameters=False)
    shared = {name: inputs[name] for name in ("x", "log_decay", "gamma", "B", "C", "ssm")}
    zeros = {name: torch.zeros_like(inputs[name]) for name in ("beta", "theta", "phi", "k", "v")}
    cotangents = {"y": torch.randn_like(inputs["x"]), "final": torch.randn_like(inputs["ssm"])}

    def mamba2(gamma, ssm, B, C, **rest):
        return ssd(weight=gamma, initial_state=ssm, B=B[:, :, 0], C=C[:, :, 0], **rest)

    def mamba3(**arguments):
        y, _, final, _, _ = flat(**arguments, **zeros, chunk_size=16, backend=path)
        return y[:, :, 0], final

    expected = run_with_gradients(mamba2, shared, ("y", "final"), cotangents)
    for name, value in run_with_gradients(mamba3, shared, ("y", "final"), cotangents).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@PATHS
@pytest.mark.parametrize("rotation", ["interleaved", "half"])
def test_rotates_the_state_by_explicit_blocks(path, rotation, device):
    """Keys and queries at rest, and a state that turns back by each increment, give the same outputs."""
    inputs = inputs_of(device, b=1, l=12, h=1, p=2, n=6, s=2, dtype=torch.float64, state=False, rotation=rotation)
    y, _ = trapezoid_ssd(**inputs, chunk_size=5, backend=path)
    k = inputs["B"][0, :, 0, 0] + inputs["B_bias"][0, 0]
    q = inputs["C"][0, :, 0, 0] + inputs["C_bias"][0, 0]
    state, before = torch.zeros(2, 6, dtype=torch.float64, device=device), 0
    for t in range(12):
        gamma, beta, log_decay = (inputs[name][0, t, 0] for name in ("gamma", "beta", "log_decay"))
        turn = torch.eye(6, dtype=torch.float64, device=device)
        for pair in range(2):
            angle = math.pi * inputs["theta"][0, t, pair].tanh() * (gamma + beta)
            first, second = (pair, pair + 3) if rotation == "half" else (2 * pair, 2 * pair + 1)
            turn[first, first] = turn[second, second] = angle.cos()
            turn[first, second], turn[second, first] = -angle.sin(), angle.sin()
        now = inputs["x"][0, t, 0][:, None] * k[t]
        state = log_decay.exp() * (state + beta * before) @ turn + gamma * now  # rows turned by minus the angle
        before = now
        torch.testing.assert_close(y[0, t, 0, 0], state @ q[t] + inputs["D"][0] * inputs["x"][0, t, 0])


@PATHS
def test_a_full_turn_changes_nothing(path, device):
    """Increments of 2 pi at every position: as without rotation, with angles of 0."""
    inputs = inputs_of(device, l=30, dtype=torch.float64, s=2, state=False)
    dt = 4.0 * torch.ones_like(inputs["gamma"])
    inputs |= {"gamma": dt / 2, "beta": dt / 2, "log_decay": -dt}
    turned = inputs | {"theta": torch.full_like(inputs["theta"], math.atanh(0.5))}
    still = inputs | {"theta": torch.zeros_like(inputs["theta"])}
    (y, state), (expected, rest) = (trapezoid_ssd(**kw, chunk_size=16, backend=path) for kw in (turned, still))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state.ssm, rest.ssm)
    torch.testing.assert_close(state.phi.cos(), torch.ones_like(state.phi))


@PATHS
def test_equal_ranks_are_one(path, device):
    """r equal ranks, each with 1 / r of the input and r times D: every output is that of one rank, so is the state."""
    one = inputs_of(device, l=30, n=8, dtype=torch.float64, rotation="half")
    many = dict(one)
    for name, dim in (("B", 2), ("C", 2), ("B_bias", 1), ("C_bias", 1), ("k", 1)):
        many[name] = one[name].repeat_interleave(3, dim=dim)
    many["D"], many["x_rank"] = 3 * one["D"], torch.full((2, 3, 3), 1 / 3, dtype=torch.float64, device=device)
    (y, phi, ssm, _, _), (ranks, _, same, _, _) = flat(**one, backend=path), flat(**many, backend=path)
    torch.testing.assert_close(ranks, y.expand_as(ranks))
    torch.testing.assert_close(same, ssm)
    assert phi.shape == (2, 2, 2)


@pytest.mark.parametrize("length", [1, 2, 16, 63, 64, 65, 129, pytest.param(300, marks=pytest.mark.slow)])
def test_lengths(length, backend, device):
    check_op(SPEC, {"b": 1, "l": length, "h": 2, "p": 3, "n": 4}, backend, torch.float32, device)


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("chunk", "parts", "blocks", "r"), [(32, 1, 2, 1), (16, 3, 1, 1), (16, 2, 2, 4)])
def test_chunks_and_parts_of_the_triton_kernels(chunk, parts, blocks, r, packed, device):
    """Cutting rows into chunks and parts, and heads into blocks, does not change results."""
    pytest.importorskip("triton")
    from omnissm.kernels.trapezoid_ssd.triton_impl import _backward, _forward

    inputs = inputs_of(device, b=1, l=70 if r == 1 else 37, h=2, n=8, r=r, packed=packed, x_rank=r > 1)
    names = ("x", "log_decay", "gamma", "beta", "theta", "B", "C", "ssm", "phi", "B_bias", "C_bias", "D")
    arguments = [inputs[name] for name in names]
    arguments[5:7] = [part.flatten(1, 2) for part in arguments[5:7]]
    arguments += [inputs.get("x_rank"), inputs.get("seq_idx"), False]
    dy = torch.randn_like(inputs["x"].repeat(1, r, 1, 1))
    dfinal, dphi = (torch.randn_like(inputs[name]) for name in ("ssm", "phi"))
    turned = spin(dfinal, _forward(*arguments, 0, 1)[1], dphi.shape[2], False).sum(2)
    gradients = [dy, dfinal, dphi + turned, dphi]
    expected = (*_forward(*arguments, 0, 1), *_backward(*arguments, *gradients, 0, 1, 1))
    found = (*_forward(*arguments, chunk, parts), *_backward(*arguments, *gradients, chunk, parts, blocks))
    for place, (value, other) in enumerate(zip(found, expected)):
        assert relative_error(value, other.double()) < 1e-5, place


def test_triton_takes_up_to_eight_ranks_and_runs_unasked_on_a_gpu(device):
    with pytest.raises(BackendError, match="Triton takes up to 8 ranks, got r=9"):
        flat(**inputs_of(device, r=9), backend="triton")
    with pytest.raises(BackendError, match="n from 2 to 256, got p=3 and n=300"):
        flat(**inputs_of(device, n=300), backend="triton")
    with pytest.raises(BackendError, match=r"128 \(64 for n above 128\) and n from 2 to 256, got p=65 and n=129"):
        flat(**inputs_of(device, p=65, n=129), backend="triton")
    inputs = inputs_of(device)
    unasked = "triton" if device.type == "cuda" and not available_backends(device)["triton"] else "chunked"
    assert torch.equal(flat(**inputs)[0], flat(**inputs, backend=unasked)[0])


@pytest.mark.parametrize("rotation", ["interleaved", "half"])
def test_triton_turns_many_pairs_back_in_slices(rotation, device):
    """As many columns as two programs take, of which some pairs stand still, in more than one chunk."""
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)
    size = {"b": 1, "l": 140, "h": 2, "p": 3, "n": 41, "s": 17, "packed": True, "rotation": rotation}
    check_op(SPEC, size, "triton", torch.float32, device)


@pytest.mark.parametrize("sizes", [(96, 3, 1, 1, 1), (1, 64, 3, 3, 2), (8, 128, 12, 1, 1), (16, 16, 12, 4, 4)], ids=str)
def test_widths(sizes, device):
    p, n, h, g, r = sizes
    size = {"b": 1, "l": 20, "h": h, "p": p, "n": n, "g": g, "r": r, "x_rank": r > 1, "chunk_size": 8}
    check_op(SPEC, size, "chunked", torch.float32, device)


@pytest.mark.parametrize("numbers", [1, 2**14])
@pytest.mark.parametrize("chunk_size", [1, 16, 64, 1000])
def test_chunks_and_blocks_are_a_matter_of_speed_only(chunk_size, numbers, device, monkeypatch):
    from omnissm.kernels.trapezoid_ssd import chunked

    inputs = inputs_of(device, b=1, l=150, r=2, dtype=torch.float64, packed=True, x_rank=True)
    expected = with_gradients(flat, inputs)
    monkeypatch.setattr(chunked, "_BLOCK_NUMBERS", {})
    monkeypatch.setattr(chunked, "_BLOCK_NUMBERS_ELSEWHERE", numbers)
    found = with_gradients(lambda **kw: flat(**kw, chunk_size=chunk_size), inputs)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def with_gradients(op, inputs):
    """Outputs and gradients for fixed gradients at all outputs."""
    with torch.no_grad():
        outputs = dict(zip(SPEC.outputs, op(**inputs)))
    generator = torch.Generator().manual_seed(2)
    cotangents = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in outputs.items()}
    return run_with_gradients(op, inputs, SPEC.outputs, cotangents)


@pytest.mark.parametrize("cut", [1, 64, 70])
@pytest.mark.parametrize("packed", [False, True])
def test_any_cut_with_the_state_handed_on(cut, packed, device):
    """Outputs, final state and all gradients of two calls equal those of one."""
    inputs = inputs_of(device, l=100, r=2, dtype=torch.float64, packed=packed, rotation="half", x_rank=True)
    if packed:
        inputs["seq_idx"][:, cut - 1 : cut + 1] = inputs["seq_idx"][:, cut, None]  # a cut inside of a sequence

    def in_two(**arguments):
        left, *state = flat(**part_of(arguments, 0, cut))
        right, *final = flat(**part_of(arguments, cut, None) | dict(zip(STATE, state)))
        return torch.cat([left, right], 1), *final

    expected = with_gradients(flat, inputs)
    for name, value in with_gradients(in_two, inputs).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@PATHS
def test_packed_rows_equal_separate_ones(path, device):
    """Segments of 1 position, across chunk borders and of a whole chunk; the state enters the first one only."""
    lengths = [5, 1, 30, 16, 1, 12]
    inputs = inputs_of(device, b=1, l=sum(lengths), dtype=torch.float64)
    inputs["seq_idx"] = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))[None].to(device)

    def packed(**arguments):
        return flat(**arguments, chunk_size=16, backend=path)

    def separate(**arguments):
        outputs, start = [], 0
        arguments.pop("seq_idx")
        for length in lengths:
            y, *final = flat(**part_of(arguments, start, start + length), backend="reference")
            outputs.append(y)
            start, arguments = start + length, without_state(arguments)
        return torch.cat(outputs, 1), *final

    expected = with_gradients(separate, inputs)
    for name, value in with_gradients(packed, inputs).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("regime", ["initial", "strong"])
def test_float32_digits(regime, device):
    size = {"b": 1, "l": 500, "h": 2, "p": 16, "n": 32, "regime": regime, "state": False}
    errors = check_op(SPEC, size, "chunked", torch.float32, device, chunk_size=64)
    assert max(errors.values()) < 5e-6, errors


@pytest.mark.parametrize("longest", [1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_angles_do_not_lose_digits_with_length(longest, device):
    """The gradient of the angle rates in bfloat16 is as good in a long row as at 256 positions, and float32's too."""
    size = {"b": 1, "h": 1, "p": 8, "n": 16, "s": 8, "state": False}
    for length in (256, longest):
        errors = check_op(SPEC, size | {"l": length}, "chunked", torch.bfloat16, device)
        assert errors["dtheta"] < 5e-3
    assert check_op(SPEC, size | {"l": longest}, "chunked", torch.float32, device)["dtheta"] < 1e-5


@PATHS
def test_extremes_stay_finite(path, device):
    inputs = inputs_of(device, l=70)
    inputs["log_decay"][:, ::3] = -1e4
    inputs["gamma"] = torch.full_like(inputs["gamma"], 1e-7)
    inputs["x"] = inputs["x"] * 1e4
    inputs["B"][:, 20:40] = 0
    inputs["theta"] = inputs["theta"] * 1e3
    for value in with_gradients(lambda **kw: flat(**kw, backend=path), inputs).values():
        assert torch.isfinite(value).all()


@PATHS
def test_no_positions(path, device):
    inputs = part_of(inputs_of(device), 0, 0)
    y, *final = flat(**inputs, backend=path)
    assert y.shape == (2, 0, 1, 2, 3)
    for name, value in zip(STATE, final):
        assert torch.equal(value, inputs[name])
    assert not any(part.any() for part in flat(**without_state(inputs), backend=path)[1:])


@PATHS
def test_causal_to_the_bit(path, device):
    inputs = inputs_of(device, l=100)
    y = flat(**inputs, chunk_size=32, backend=path)[0]
    for name in ("x", "B", "C", "gamma", "theta"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, 60:] += 1
    changed = flat(**inputs, chunk_size=32, backend=path)[0]
    assert torch.equal(y[:, :60], changed[:, :60])
    assert not torch.equal(y[:, 60:], changed[:, 60:])


def test_wrong_arguments(device):
    inputs = without_state(inputs_of(device, h=3, g=3))
    with pytest.raises(ValueError, match="`B` has g=2 groups, expected a divisor of the 3 heads"):
        trapezoid_ssd(**inputs | {"B": inputs["B"][:, :, :, :2], "C": inputs["C"][:, :, :, :2]})
    with pytest.raises(ValueError, match=r"`log_decay` has l=9, expected 10 \(from `x`\)"):
        trapezoid_ssd(**inputs | {"log_decay": inputs["log_decay"][:, :9]})
    with pytest.raises(ValueError, match="`theta` has s=3 angles, expected at most 2, half of n=4"):
        trapezoid_ssd(**inputs | {"theta": torch.zeros(2, 10, 3, device=device)})
    with pytest.raises(ValueError, match="rotation must be 'interleaved' or 'half', got 'whole'"):
        trapezoid_ssd(**inputs | {"rotation": "whole"})
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        trapezoid_ssd(**inputs, chunk_size=0)
    with pytest.raises(TypeError, match=r"must be a TrapezoidState\(phi, ssm, k, v\), got Tensor"):
        trapezoid_ssd(**inputs, initial_state=inputs["x"])


@PATHS
def test_autocast(path, device):
    """x, B and C are cast; everything else stays float32, in the gradient too."""
    inputs = inputs_of(device, l=30)
    cast = inputs | {name: inputs[name].bfloat16() for name in ("x", "B", "C")}
    expected = with_gradients(lambda **kw: flat(**kw, backend=path), cast)
    with torch.autocast(device.type, torch.bfloat16):
        found = with_gradients(lambda **kw: flat(**kw, backend=path), inputs)
    assert (found["y"].dtype, found["final_ssm"].dtype) == (torch.bfloat16, torch.float32)
    for name in ("y", "final_ssm", "final_k", "dx", "dB", "dtheta", "dgamma"):
        torch.testing.assert_close(found[name], expected[name].to(found[name].dtype), msg=name)


def test_vmap_and_gradients_per_sample(device):
    rows = [inputs_of(device, b=1, l=9, r=2, seed=seed, x_rank=True) for seed in range(3)]
    names = [name for name in rows[0] if name != "rotation"]
    rows = [{name: row[name] for name in names} for row in rows]
    stacked = [torch.stack([row[name] for row in rows]) for name in names]

    def op(*tensors):
        return flat(**dict(zip(names, tensors)), chunk_size=4, backend="chunked")

    def loss(*tensors):
        return op(*tensors)[0].square().sum()

    each = torch.func.vmap(op)(*stacked)
    for found, expected in zip(each, zip(*(op(*row.values()) for row in rows))):
        torch.testing.assert_close(found, torch.stack(expected))
    every = tuple(range(len(names)))
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=every))(*stacked)
    alone = zip(*(torch.func.grad(loss, argnums=every)(*row.values()) for row in rows))
    for found, expected in zip(per_sample, alone):
        torch.testing.assert_close(found, torch.stack(expected))
    shared = torch.func.vmap(lambda x: flat(**rows[0] | {"x": x})[0])(stacked[0])
    torch.testing.assert_close(shared, torch.stack([flat(**rows[0] | {"x": x})[0] for x in stacked[0]]))


def test_opcheck(device):
    """Schema, fake tensors and dynamic shapes of the custom ops."""
    from omnissm.kernels.trapezoid_ssd.chunked import _backward, _forward

    inputs = inputs_of(device, l=5, r=2, x_rank=True)
    names = ("x", "log_decay", "gamma", "beta", "theta", "B", "C", "ssm", "phi", "B_bias", "C_bias", "D", "x_rank")
    arguments = (*(inputs[name] for name in names), None, False, 2)
    torch.library.opcheck(_forward, arguments)
    outputs = _forward(*arguments)
    torch.library.opcheck(_backward, (*arguments, *(torch.randn_like(part) for part in outputs)))


def test_export_with_dynamic_length(device):
    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return trapezoid_ssd(*tensors)

    def positional(length):
        inputs = inputs_of(device, l=length)
        return tuple(inputs[name] for name in ALONG[:7])

    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Scan(), positional(6), dynamic_shapes=(({1: length},) * 7,))
    for count in (2, 23, 130):
        (y, state), (expected, final) = program.module()(*positional(count)), trapezoid_ssd(*positional(count))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(tuple(state), tuple(final))


def test_compile_once_for_all_lengths(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flat, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 9, 70):
        inputs = inputs_of(device, l=length, packed=True)
        expected = with_gradients(flat, inputs)
        cotangents = {"y": torch.ones_like(expected["y"])}
        expected = run_with_gradients(flat, inputs, SPEC.outputs, cotangents)
        for name, value in run_with_gradients(compiled, inputs, SPEC.outputs, cotangents).items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert counter.frame_count == 1


def test_memory_of_forward_and_backward(device, monkeypatch):
    """No temporary is larger than the inputs: rotated keys and (q, q) matrices of all chunks never exist together."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for value in found if isinstance(found, tuple | list) else (found,):
                if isinstance(value, torch.Tensor) and not value._is_view():
                    self.numbers = max(self.numbers, value.untyped_storage().nbytes() // 4)
            return found

    from omnissm.kernels.trapezoid_ssd import chunked
    from omnissm.kernels.trapezoid_ssd.chunked import _gradients, _outputs

    monkeypatch.setattr(chunked, "_BLOCK_NUMBERS_ELSEWHERE", 2**18)  # as on a CPU: larger devices take larger blocks
    inputs = inputs_of(device, b=1, l=4096, h=4, p=16, n=32)
    ranks = torch.ones(4, 1, 16, device=device)
    names = (*ALONG[:7], "ssm", "phi", "B_bias", "C_bias", "D")
    arguments = [inputs[name] for name in names] + [ranks, None, False, 64]
    with Largest() as largest, torch.no_grad():
        outputs = _outputs(*arguments)
        _gradients(*arguments, *outputs)
    assert largest.numbers <= max(inputs["x"].numel(), 2**18)  # keys of all heads: 2^19; all matrices: 2^20


def test_rotation_keeps_lengths_and_adds_angles():
    x, a, b = torch.randn(5, 7), torch.randn(5, 3), torch.randn(5, 3)
    for half in (False, True):
        twice = rotate(rotate(x, a.cos(), a.sin(), half), b.cos(), b.sin(), half)
        torch.testing.assert_close(twice, rotate(x, (a + b).cos(), (a + b).sin(), half))
        torch.testing.assert_close(twice.norm(dim=1), x.norm(dim=1))
    quarter = rotate(torch.arange(4.0), torch.zeros(1), torch.ones(1), False)
    torch.testing.assert_close(quarter, torch.tensor([-1.0, 0.0, 2.0, 3.0]))
    quarter = rotate(torch.arange(4.0), torch.zeros(1), torch.ones(1), True)
    torch.testing.assert_close(quarter, torch.tensor([-2.0, 1.0, 0.0, 3.0]))


def step_inputs(inputs, t):
    taken = {name: inputs[name][:, t] for name in ALONG[:7]}
    return taken | {name: inputs[name] for name in ("B_bias", "C_bias", "D", "x_rank", "rotation") if name in inputs}


@pytest.mark.parametrize("r", [1, 3])
def test_steps_equal_the_scan(r, device):
    inputs = inputs_of(device, l=70, h=4, g=2, r=r, x_rank=r > 1, rotation="half")
    y, *final = flat(**inputs)
    state = TrapezoidState(*(inputs[name] for name in STATE))
    place = TrapezoidState(*(part.clone() for part in state))
    for t in range(70):
        one, state = trapezoid_step(**step_inputs(inputs, t), state=state)
        same = trapezoid_step_(**step_inputs(inputs, t), state=place)
        assert torch.equal(one, same)
        assert relative_error(one, y[:, t].double()) < 1e-5
    for part, other, expected in zip(state, place, final):
        assert torch.equal(part, other)
        assert relative_error(part, expected.double()) < 3e-6


def test_step_gradients(device):
    inputs = inputs_of(device, l=1, r=2, dtype=torch.float64, x_rank=True)
    arguments = step_inputs(inputs, 0) | {name: inputs[name] for name in STATE}
    names = [name for name in arguments if name != "rotation"]
    leaves = tuple(arguments[name].requires_grad_() for name in names)

    def op(*tensors, **options):
        given = dict(zip(names, tensors))
        state = TrapezoidState(*(given.pop(name) for name in STATE))
        y, state = trapezoid_step(**given, state=state, **options)
        return y, *state

    assert torch.autograd.gradcheck(op, leaves)
    index = torch.tensor([1, -1], device=device)
    assert torch.autograd.gradcheck(lambda *tensors: op(*tensors, state_index=index), leaves)


@pytest.mark.parametrize("index", [[4, -1, 0], [-1, -1, -1], [2, 1, 3]], ids=str)
def test_paged_states(index, device):
    """Rows use the states they name; padding rows give 0 and leave every state as it was."""
    inputs = step_inputs(inputs_of(device, b=3), 0)
    pool = TrapezoidState(*(inputs_of(device, b=5, seed=1)[name] for name in STATE))
    index = torch.tensor(index, dtype=torch.int32, device=device)
    kept, expected = ([part.clone() for part in pool] for _ in range(2))
    y, new = trapezoid_step(**inputs, state=pool, state_index=index)
    for row, place in enumerate(index.tolist()):
        if place < 0:
            assert not y[row].any()
            continue
        alone = {name: inputs[name][row : row + 1] if name in ALONG else inputs[name] for name in inputs}
        found, state = trapezoid_step(**alone, state=TrapezoidState(*(part[place : place + 1] for part in kept)))
        torch.testing.assert_close(y[row], found[0])
        for part, value in zip(expected, state):
            part[place] = value[0]
    for part, value, before, old in zip(new, expected, pool, kept):
        torch.testing.assert_close(part, value)
        assert torch.equal(before, old)
    assert torch.equal(trapezoid_step_(**inputs, state=pool, state_index=index), y)
    for part, value in zip(pool, new):
        assert torch.equal(part, value)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("pairs", "n"), [(2, 8), (4, 8), (3, 7), (0, 5)])
def test_the_last_key_in_one_kernel_is_that_of_the_step(pairs, n, half, device):
    triton_last = pytest.importorskip("omnissm.kernels.trapezoid_ssd.triton_last")
    batch, ranks, groups, heads = 3, 2, 2, 4
    wide = {"dtype": torch.float64, "device": device}
    phi = (6 * torch.rand(batch, heads, pairs, **wide)).requires_grad_()
    B = torch.randn(batch, 5, ranks, groups, n, **wide, requires_grad=True)
    bias = torch.randn(heads, ranks, n, **wide, requires_grad=True)

    def expected(phi, B, bias):
        keys = B.repeat_interleave(heads // groups, dim=2) + bias.transpose(0, 1)
        return rotate(keys, phi.cos()[:, None], phi.sin()[:, None], half)

    found, wanted = triton_last.last_key(phi, B[:, -1], bias, half), expected(phi, B[:, -1], bias)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    given = torch.randn_like(found)
    gradients = [torch.autograd.grad(one, (phi, B, bias), given) for one in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)
