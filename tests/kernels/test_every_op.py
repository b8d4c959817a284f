"""What holds for every op with a `spec.py`; a new op is tested here by existing."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import omnissm.kernels
from omnissm.kernels.testing import OpSpec, check_op, relative_error, run_with_gradients

FOLDER = Path(omnissm.kernels.__file__).parent
SPECS: list[OpSpec] = [
    spec
    for path in sorted(FOLDER.glob("*/spec.py"))
    for spec in vars(import_module(f"omnissm.kernels.{path.parent.name}.spec")).values()
    if isinstance(spec, OpSpec)
]


def name_of(value) -> str | None:
    """How a parameter appears in the name of a test."""
    if isinstance(value, OpSpec):
        return value.name
    return str(value).removeprefix("torch.")


EVERY = pytest.mark.parametrize("spec", SPECS, ids=name_of)
# Triton's interpreter is slow; what it would only repeat is left to the slow tests and to a GPU.
INTERPRETED = not torch.cuda.is_available()
REPEATED = [pytest.mark.slow] if INTERPRETED else []
CASES = [
    pytest.param(
        spec,
        size,
        backend,
        dtype,
        marks=REPEATED if backend == "triton" and dtype != torch.float32 and place != 1 else [],
    )
    for spec in SPECS
    for place, size in enumerate(spec.test_sizes)
    for backend in ("chunked", "triton")
    for dtype in (torch.float32, torch.bfloat16)
]


def size_of(spec: OpSpec, backend: str) -> dict:
    """A size for what has nothing to do with sizes."""
    size = dict(spec.test_sizes[1])
    if backend == "triton" and INTERPRETED and "l" in size:
        size["l"] = min(size["l"], 9)
    return size


def inputs_of(spec: OpSpec, device: torch.device, size=None, dtype=torch.float32) -> dict:
    generator = torch.Generator(device).manual_seed(1)
    return spec.make_inputs(**(size or spec.test_sizes[1]), dtype=dtype, device=device, generator=generator)


def skip_unless_offered(spec: OpSpec, backend: str, size=None) -> None:
    if not spec.offers(backend, size):
        pytest.skip(f"{spec.name} has no {backend} implementation")


def run(spec: OpSpec, inputs: dict, backend: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = spec.op(**inputs, backend=backend)
    outputs = dict(zip(spec.outputs, found if isinstance(found, tuple) else (found,)))
    generator = torch.Generator().manual_seed(2)
    ones = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in outputs.items()}
    return run_with_gradients(lambda **kw: spec.op(**kw, backend=backend), inputs, spec.outputs, ones)


@pytest.mark.parametrize(("spec", "size", "backend", "dtype"), CASES, ids=name_of)
def test_matches_reference(spec, size, backend, dtype, device):
    skip_unless_offered(spec, backend, size)
    if reason := omnissm.kernels.available_backends(device)[backend]:
        pytest.skip(reason)
    check_op(spec, size, backend, dtype, device)


@EVERY
def test_float16_and_float64(spec, backend, device):
    skip_unless_offered(spec, backend)
    check_op(spec, size_of(spec, backend), backend, torch.float16, device)
    check_op(spec, size_of(spec, backend), backend, torch.float64, device)


@EVERY
def test_any_strides(spec, backend, device):
    """Transposed storage, every second element and gradients in the layout of the inputs' values."""
    skip_unless_offered(spec, backend)
    inputs = inputs_of(spec, device, size_of(spec, backend))
    expected = run(spec, inputs, backend)

    def rearranged(x):
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            return x
        gaps = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        gaps[..., ::2] = x
        sparse = gaps[..., ::2]
        return sparse.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else sparse

    got = run(spec, {name: rearranged(value) for name, value in inputs.items()}, backend)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@EVERY
def test_rows_that_share_their_memory(spec, backend, device):
    """Tensors that repeat their first row (stride 0) count as copies of it, and each row gets its own gradient."""
    skip_unless_offered(spec, backend)
    size = size_of(spec, backend)
    if backend == "triton" and INTERPRETED and "l" not in size:
        pytest.skip("grids and graphs take long in the interpreter; a GPU runs them")
    inputs = inputs_of(spec, device, size)

    def repeated(x):
        several = torch.is_tensor(x) and x.is_floating_point() and x.dim() > 1 and x.shape[0] > 1
        return x[:1].expand_as(x) if several else x

    def gradients(inputs):
        leaves = {
            name: x.detach().requires_grad_()
            for name, x in inputs.items()
            if torch.is_tensor(x) and x.is_floating_point()
        }
        found = spec.op(**inputs | leaves, backend=backend)
        outputs = [value for value in (found if isinstance(found, tuple) else (found,)) if value.requires_grad]
        loss = sum(value.float().square().sum() for value in outputs)
        return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]

    shared = {name: repeated(value) for name, value in inputs.items()}
    copied = {name: value.contiguous() if torch.is_tensor(value) else value for name, value in shared.items()}
    torch.testing.assert_close(gradients(shared), gradients(copied), rtol=1e-5, atol=1e-5)


@EVERY
def test_two_runs_agree_to_the_bit_and_inputs_stay(spec, backend, device):
    skip_unless_offered(spec, backend)
    inputs = inputs_of(spec, device, size_of(spec, backend))
    kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    first, second = run(spec, inputs, backend), run(spec, inputs, backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, kept[name]), name


@EVERY
def test_inference_mode_and_checkpointing(spec, backend, device):
    skip_unless_offered(spec, backend)
    inputs = inputs_of(spec, device, size_of(spec, backend))
    expected = run(spec, inputs, backend)
    with torch.inference_mode():
        found = spec.op(**inputs, backend=backend)
    first = found[0] if isinstance(found, tuple) else found
    assert relative_error(first, expected[spec.outputs[0]].double()) < 1e-6  # sums may be taken in another order

    leaves = {name: x.requires_grad_() for name, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point()}
    found = checkpoint(lambda: spec.op(**inputs, backend=backend), use_reentrant=False)
    named = dict(zip(spec.outputs, found if isinstance(found, tuple) else (found,)))
    generator = torch.Generator().manual_seed(2)
    pairs = [(value, torch.randn(value.shape, generator=generator).to(value)) for value in named.values()]
    pairs = [(value, cotangent) for value, cotangent in pairs if value.requires_grad]
    outputs, cotangents = zip(*pairs)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    for name, gradient in zip(leaves, gradients):
        assert torch.equal(gradient, expected[f"d{name}"]), name


@EVERY
@pytest.mark.parametrize("projected", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_first_and_second_derivative_by_differences(spec, projected, device):
    """Finite differences of the chunked path, or the reference where there is none, at a tiny size.

    Along random directions, or, which takes long, of each number by each.
    """
    backend = "chunked" if "chunked" in spec.implementations else "reference"
    size = {name: value if type(value) is not int or value <= 4 else 3 for name, value in spec.test_sizes[1].items()}
    inputs = inputs_of(spec, device, size, torch.float64)
    names = [name for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()]
    leaves = tuple(inputs[name].requires_grad_() for name in names)

    def op(*tensors):
        return spec.op(**{**inputs, **dict(zip(names, tensors))}, backend=backend)

    assert torch.autograd.gradcheck(op, leaves, fast_mode=projected)
    if spec.twice_differentiable:
        assert torch.autograd.gradgradcheck(op, leaves, fast_mode=projected)


@EVERY
def test_every_tensor_is_checked(spec, device):
    """One more in the last dimension of any single tensor is refused, and the message names a tensor."""
    inputs = inputs_of(spec, device, spec.test_sizes[min(2, len(spec.test_sizes) - 1)])
    if sum(map(torch.is_tensor, inputs.values())) < 2:
        pytest.skip(f"{spec.name} has one tensor, whose shape agrees with itself")
    for name, value in inputs.items():
        if not torch.is_tensor(value) or value.dim() == 0:
            continue
        longer = torch.cat([value, value[..., :1]], dim=-1)
        if name not in spec.free:
            with pytest.raises(ValueError, match=r"`\w+` (has|must)"):
                spec.op(**{**inputs, name: longer})
        with pytest.raises(TypeError, match=f"`{name}`"):
            spec.op(**{**inputs, name: "text"})
