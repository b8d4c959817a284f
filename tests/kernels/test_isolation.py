"""A NaN or an infinity in one packed sequence: the others, and other rows, give the numbers they give without it."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch

import omnissm.kernels
from omnissm.kernels.testing import OpSpec, run_with_gradients

FOLDER = Path(omnissm.kernels.__file__).parent
SPECS = [import_module(f"omnissm.kernels.{path.parent.name}.spec").SPEC for path in sorted(FOLDER.glob("*/spec.py"))]
PACKED = [spec for spec in SPECS if "packed" in inspect.signature(spec.make_inputs).parameters]
LENGTH = 13
SICK = slice(4, 9)  # the second of three sequences
BAD = (0, 6)


def name_of(spec):
    return spec.name


EVERY = pytest.mark.parametrize("spec", PACKED, ids=name_of)


def inputs_of(spec: OpSpec, device, **options) -> dict:
    size = {name: value for name, value in spec.test_sizes[1].items() if name not in ("chunk_size", "state", "packed")}
    size |= {"b": 2, "l": LENGTH} | options
    generator = torch.Generator(device).manual_seed(4)
    inputs = spec.make_inputs(**size, dtype=torch.float32, device=device, generator=generator)
    index = torch.arange(LENGTH, device=device)
    inputs["seq_idx"] = ((index >= SICK.start).int() + (index >= SICK.stop).int()).expand(2, -1)
    return inputs


def has_positions(value) -> bool:
    return torch.is_tensor(value) and value.shape[:2] == (2, LENGTH)


def run(spec: OpSpec, inputs: dict, backend: str, bad_gradient=None) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = spec.op(**inputs, backend="chunked")
    outputs = dict(zip(spec.outputs, found if isinstance(found, tuple) else (found,)))
    generator = torch.Generator(inputs["seq_idx"].device).manual_seed(5)
    cotangents = {
        name: torch.randn(value.shape, generator=generator, device=value.device) for name, value in outputs.items()
    }
    if bad_gradient is not None:
        cotangents[spec.outputs[0]][bad_gradient] = torch.nan
    return run_with_gradients(lambda **tensors: spec.op(**tensors, backend=backend), inputs, spec.outputs, cotangents)


def compare(found: dict, expected: dict, inputs: dict, spec: OpSpec) -> None:
    """All that belongs to other sequences is as it was, up to the rounding of sums."""
    others = torch.ones(2, LENGTH, dtype=torch.bool)
    others[0, SICK] = False
    for name, value in found.items():
        if name in spec.outputs[1:]:
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")
        elif name == spec.outputs[0] or has_positions(inputs[name[1:]]):
            assert expected[name][others].isfinite().all()
            close = {"rtol": 1e-5, "atol": 1e-4}
            torch.testing.assert_close(
                value[others], expected[name][others], **close, msg=lambda m, n=name: f"{n}: {m}"
            )


def skip_unless_offered(spec: OpSpec, backend: str, device) -> None:
    if not spec.offers(backend) or omnissm.kernels.available_backends(device)[backend]:
        pytest.skip(f"{spec.name} has no {backend} implementation here")


@EVERY
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_every_input(spec, backend, device):
    inputs = inputs_of(spec, device)
    expected = run(spec, inputs, backend)
    names = [name for name, value in inputs.items() if has_positions(value) and name != "seq_idx"]
    for place, name in enumerate(names):
        sick = inputs | {name: inputs[name].clone()}
        sick[name][BAD] = torch.nan if place % 2 == 0 or name.startswith("log") else torch.inf
        found = run(spec, sick, backend)
        compare(found, expected, inputs, spec)
        assert not found[spec.outputs[0]][0, BAD[1] : SICK.stop].isfinite().all(), name


@EVERY
@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_a_gradient_that_arrives(spec, backend, device):
    """A NaN that enters at an output, and for Triton, which the interpreter runs slowly, one in an input at once."""
    skip_unless_offered(spec, backend, device)
    with_input = backend == "triton"
    inputs = inputs_of(spec, device)
    expected = run(spec, inputs, backend)
    main = next(name for name, value in inputs.items() if has_positions(value) and not name.startswith("log"))
    sick = inputs | {main: inputs[main].clone()}
    if with_input:
        sick[main][BAD] = torch.inf
    found = run(spec, sick, backend, BAD)
    compare(found, expected, inputs, spec)
    assert found[spec.outputs[0]].isfinite().all() != with_input
    assert not found[f"d{main}"][0, SICK].isfinite().all()


@EVERY
def test_numbers_of_sequences_are_checked(spec, device):
    inputs = inputs_of(spec, device)
    with pytest.raises(TypeError, match=r"`seq_idx` must be a tensor of integers, got torch\.float32"):
        spec.op(**inputs | {"seq_idx": inputs["seq_idx"].float()})
    wrong = inputs["seq_idx"].clone()
    wrong[1, 2] = 1
    if device.type == "cpu":
        with pytest.raises(ValueError, match="must not decrease along a row, got 0 after 1 at position 3 of row 1"):
            spec.op(**inputs | {"seq_idx": wrong})


@pytest.mark.parametrize("spec", [spec for spec in PACKED if "ssd" in spec.name or "quasi" in spec.name], ids=name_of)
def test_decays_above_one_are_refused(spec, device):
    inputs = inputs_of(spec, device)
    name = next(name for name in inputs if name.startswith("log_decay"))
    inputs[name] = inputs[name].clone()
    inputs[name][BAD] = 0.5
    if device.type == "cpu":
        with pytest.raises(ValueError, match=f"`{name}` must be <= 0, got 0.5; it is the logarithm"):
            spec.op(**inputs)


def test_what_forgets_all_is_a_proper_decay(device):
    """A log-decay of minus infinity, in the middle of a sequence, and infinite states that nothing reads."""
    inputs = next(inputs_of(spec, device) for spec in PACKED if spec.name == "ssd")
    inputs["log_decay"] = inputs["log_decay"].clone()
    inputs["log_decay"][:, 6] = -torch.inf
    y, final = omnissm.kernels.ssd(**inputs)
    cut = inputs | {"seq_idx": inputs["seq_idx"] + (torch.arange(LENGTH, device=device) >= 6)}
    expected, expected_final = omnissm.kernels.ssd(**cut)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(final, expected_final)


def test_initial_states(device):
    """A bad state of a row reaches its first sequence, and for the recurrence from the right its last one."""
    spec = next(spec for spec in PACKED if spec.name == "quasiseparable")
    inputs = inputs_of(spec, device, state=True)
    y, final = spec.op(**inputs)
    state = inputs["initial_state"].clone()
    state[0, 0, 0, 0, 0] = torch.nan
    state[1, 1, 0, 0, 0] = torch.inf
    got, got_final = spec.op(**inputs | {"initial_state": state})
    well = torch.ones(2, LENGTH, dtype=torch.bool, device=device)
    well[0, : SICK.start] = False
    well[1, SICK.stop :] = False
    torch.testing.assert_close(got[well], y[well])
    assert got[~well].isnan().all()
    assert got_final.isnan().flatten(2).all(2).tolist() == [[False, True], [True, False]]
    torch.testing.assert_close(got_final[0, 0], final[0, 0])
    torch.testing.assert_close(got_final[1, 1], final[1, 1])


def test_compiled_and_mapped(device):
    """In one graph, with the gradient, and under vmap, as one call after another gives it."""
    spec = next(spec for spec in PACKED if spec.name == "ssd")
    inputs = inputs_of(spec, device)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][BAD] = torch.nan
    expected = run(spec, inputs, "chunked")
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(**tensors):
        return spec.op(**tensors, backend="chunked")

    leaf = inputs["x"].detach().requires_grad_()
    y, final = compiled(**inputs | {"x": leaf})
    torch.testing.assert_close(y, expected["y"], equal_nan=True)
    torch.testing.assert_close(final, expected["final_state"], equal_nan=True)
    eager = torch.autograd.grad(spec.op(**inputs | {"x": leaf}, backend="chunked")[0].sum(), leaf)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf), eager, equal_nan=True)

    def loss(x, seq_idx):
        return spec.op(**inputs | {"x": x, "seq_idx": seq_idx})[0].sum()

    stacked, index = torch.stack([leaf.detach(), leaf.detach() * 2]), torch.stack([inputs["seq_idx"]] * 2)
    found = torch.func.vmap(torch.func.grad(loss))(stacked, index)
    torch.testing.assert_close(found[0], eager[0], equal_nan=True)


def test_second_derivative_of_a_packed_row(device):
    spec = next(spec for spec in PACKED if spec.name == "ssd")
    inputs = inputs_of(spec, device)
    x = inputs["x"].clone()
    x[BAD] = torch.nan
    well = torch.ones(2, LENGTH, dtype=torch.bool, device=device)
    well[0, SICK] = False

    def curvature(x):
        x = x.detach().requires_grad_()
        B = inputs["B"].detach().requires_grad_()
        y = spec.op(**inputs | {"x": x, "B": B}, backend="chunked")[0]
        (dB,) = torch.autograd.grad(y[well].square().sum(), B, create_graph=True)
        return torch.autograd.grad(dB[well].square().sum(), x)[0][well]

    torch.testing.assert_close(curvature(x), curvature(inputs["x"]))


@EVERY
def test_forward_mode(spec, device):
    """Packed rows have a derivative along a direction on the reference path, and it ends where the sequence does."""
    inputs = inputs_of(spec, device)
    main = next(name for name, value in inputs.items() if has_positions(value) and not name.startswith("log"))

    def op(x):
        return spec.op(**inputs | {main: x}, backend="reference")[0]

    direction = torch.randn_like(inputs[main])
    _, moved = torch.func.jvp(op, (inputs[main],), (direction,))
    _, pulled = torch.func.vjp(op, inputs[main])
    cotangent = torch.randn_like(moved)
    torch.testing.assert_close(
        (moved * cotangent).sum(), (pulled(cotangent)[0] * direction).sum(), rtol=1e-4, atol=1e-4
    )
    sick = inputs[main].clone()
    sick[BAD] = torch.nan
    well = torch.ones(2, LENGTH, dtype=torch.bool, device=device)
    well[0, SICK] = False
    torch.testing.assert_close(torch.func.jvp(op, (sick,), (direction,))[1][well], moved[well])
