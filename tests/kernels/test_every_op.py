"""What holds for every op with a `spec.py`; a new op is tested here by existing."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import omnissm.kernels
from omnissm.kernels.testing import OpSpec, check_op, run_with_gradients

FOLDER = Path(omnissm.kernels.__file__).parent
SPECS: list[OpSpec] = [
    spec
    for path in sorted(FOLDER.glob("*/spec.py"))
    for spec in vars(import_module(f"omnissm.kernels.{path.parent.name}.spec")).values()
    if isinstance(spec, OpSpec)
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
SIZES = [pytest.param(spec, size, id=f"{spec.name}-{dict(size)}") for spec in SPECS for size in spec.test_sizes]


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


@pytest.mark.parametrize(("spec", "size"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_matches_reference(spec, size, dtype, backend, device):
    skip_unless_offered(spec, backend, size)
    check_op(spec, size, backend, dtype, device)


@EVERY
def test_float16_and_float64(spec, backend, device):
    skip_unless_offered(spec, backend)
    check_op(spec, spec.test_sizes[1], backend, torch.float16, device)
    check_op(spec, spec.test_sizes[1], backend, torch.float64, device)


@EVERY
def test_any_strides(spec, backend, device):
    """Transposed storage, every second element and gradients in the layout of the inputs' values."""
    skip_unless_offered(spec, backend)
    inputs = inputs_of(spec, device)
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
def test_two_runs_agree_to_the_bit_and_inputs_stay(spec, backend, device):
    skip_unless_offered(spec, backend)
    inputs = inputs_of(spec, device)
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
    inputs = inputs_of(spec, device)
    expected = run(spec, inputs, backend)
    with torch.inference_mode():
        found = spec.op(**inputs, backend=backend)
    first = found[0] if isinstance(found, tuple) else found
    assert torch.equal(first, expected[spec.outputs[0]])

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
def test_first_and_second_derivative_by_differences(spec, device):
    """Finite differences of the chunked path, or the reference where there is none, at a tiny size."""
    backend = "chunked" if "chunked" in spec.implementations else "reference"
    size = {name: value if type(value) is not int or value <= 4 else 3 for name, value in spec.test_sizes[1].items()}
    inputs = inputs_of(spec, device, size, torch.float64)
    names = [name for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()]
    leaves = tuple(inputs[name].requires_grad_() for name in names)

    def op(*tensors):
        return spec.op(**{**inputs, **dict(zip(names, tensors))}, backend=backend)

    assert torch.autograd.gradcheck(op, leaves)
    if spec.twice_differentiable:
        assert torch.autograd.gradgradcheck(op, leaves)


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
