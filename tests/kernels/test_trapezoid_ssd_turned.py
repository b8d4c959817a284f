"""Outputs of `trapezoid_ssd` in Triton for 16-bit inputs, in wider numbers too, so that every digit is seen."""

import pytest
import torch

from omnissm.kernels import available_backends
from omnissm.kernels.testing import check_op, relative_error, run_with_gradients
from omnissm.kernels.trapezoid_ssd.spec import SPEC, make_inputs
from omnissm.kernels.trapezoid_ssd.spec import trapezoid_ssd as flat


@pytest.fixture(autouse=True)
def _where_triton_runs(device) -> None:
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)


@pytest.fixture
def always(device, monkeypatch) -> None:
    """Take these kernels for all dtypes; on a GPU wide numbers have too little room in them."""
    if device.type == "cuda":
        pytest.skip("wide numbers run in the interpreter only")
    from omnissm.kernels.trapezoid_ssd import triton_impl

    monkeypatch.setattr(triton_impl, "fuses", lambda given: True)


def inputs_of(device, b=1, l=20, h=2, p=3, n=8, r=1, dtype=torch.float32, **options):  # noqa: E741
    generator = torch.Generator(device).manual_seed(0)
    return make_inputs(b, l, h, p, n, r, dtype=dtype, device=device, generator=generator, **options)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "size",
    [
        {"l": 1, "h": 1, "p": 1, "n": 16, "s": 3},
        {"l": 140, "h": 2, "p": 3, "n": 4, "s": 0, "parameters": False},
        {"l": 130, "h": 1, "p": 6, "n": 41, "s": 17, "rotation": "half", "packed": True},
        {"l": 19, "h": 4, "p": 3, "n": 9, "g": 2, "r": 8, "s": 2, "rotation": "half", "packed": True, "x_rank": True},
        {"l": 40, "h": 1, "p": 5, "n": 8, "r": 3, "regime": "strong"},
    ],
    ids=str,
)
def test_all_digits(size, device):
    """Groups, ranks, odd widths, pairs that stand still, packing, more than one chunk."""
    check_op(SPEC, {"b": 1} | size, "triton", torch.float64, device)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("chunk", "parts", "r"), [(32, 1, 1), (16, 3, 1), (16, 2, 4)])
def test_chunks_and_parts(chunk, parts, r, device):
    """Cutting rows into chunks and parts does not change results."""
    from omnissm.kernels.trapezoid_ssd.triton_impl import _forward

    inputs = inputs_of(device, b=2, l=70 if r == 1 else 21, h=1, r=r, packed=r > 1, x_rank=r > 1)
    names = ("x", "log_decay", "gamma", "beta", "theta", "B", "C", "ssm", "phi", "B_bias", "C_bias", "D")
    arguments = [inputs[name] for name in names]
    arguments[5:7] = [part.flatten(1, 2) for part in arguments[5:7]]
    arguments += [inputs.get("x_rank"), inputs.get("seq_idx"), False]
    for value, other in zip(_forward(*arguments, chunk, parts), _forward(*arguments, 0, 1)):
        assert relative_error(value, other.double()) < 1e-5


@pytest.mark.parametrize("regime", ["initial", "strong"])
def test_angles_keep_their_digits_in_bfloat16(regime, device):
    """What key and query of a position add to their angle is left out, and long rows are as good as short ones."""
    for length in (256, 4096) if device.type == "cuda" else (150,):
        size = {"b": 1, "l": length, "h": 2, "p": 64, "n": 64, "s": 16, "regime": regime, "state": False}
        error = check_op(SPEC, size, "triton", torch.bfloat16, device)["dtheta"]
        assert error < (1e-2 if device.type == "cuda" else 2e-2)  # the interpreter rounds towards zero


def test_opcheck(device):
    """Schema, fake tensors and dynamic shapes of the custom op in bfloat16, with ranks and without."""
    from omnissm.kernels.trapezoid_ssd.triton_impl import _forward

    for r in (1, 2):
        inputs = inputs_of(device, l=3, h=1, r=r, dtype=torch.bfloat16, x_rank=r > 1)
        names = ("x", "log_decay", "gamma", "beta", "theta", "B", "C", "ssm", "phi", "B_bias", "C_bias", "D")
        tensors = [inputs[name].flatten(1, 2) if name in "BC" else inputs[name] for name in names]
        arguments = (*tensors, inputs.get("x_rank"), None, False)
        torch.library.opcheck(_forward, (*arguments, 0, 0))


def test_twice_the_same_bits_and_nothing_left_unwritten(device):
    """Two runs in bfloat16 are equal to the bit, also where new memory holds NaN."""
    inputs = inputs_of(device, b=2, l=35, r=2, dtype=torch.bfloat16, packed=True, x_rank=True)
    cotangents = {"y": torch.randn(2, 35, 2, 2, 3, device=device), "final_ssm": torch.randn_like(inputs["ssm"])}

    def run():
        return run_with_gradients(lambda **kw: flat(**kw, backend="triton"), inputs, SPEC.outputs, cotangents)

    expected = run()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in expected.items():
        assert torch.isfinite(value.float()).all(), name
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize(
    "size",
    [
        {"l": 140, "h": 2, "p": 6, "n": 128},
        {"l": 40, "h": 4, "p": 5, "n": 77, "g": 2, "r": 2, "s": 20, "rotation": "half", "packed": True, "x_rank": True},
        {"l": 30, "h": 1, "p": 3, "n": 100, "s": 3, "state": False},
        {"l": 130, "h": 1, "p": 3, "n": 64, "packed": True},
    ],
    ids=str,
)
def test_gradients_of_rows_that_are_not_cut(size, device, monkeypatch):
    """Keys and queries of wide states are written turned only as far as they turn, 64 columns."""
    from omnissm.kernels.trapezoid_ssd import triton_impl

    widths = []

    def empty_keys(*arguments):
        keys = make(*arguments)
        widths.append(keys.shape[-1])
        return keys

    make = triton_impl.empty_keys
    monkeypatch.setattr(triton_impl, "empty_keys", empty_keys)
    # On a GPU in 16 bits, with rows enough that they are not cut.
    wide, few = (torch.float64, {"b": 1}) if device.type == "cpu" else (torch.bfloat16, {"b": 64, "p": 40})
    check_op(SPEC, size | few, "triton", wide, device)
    assert set(widths) == {64}


def test_angles_of_many_chunks(device):
    """Sums of angles up to each chunk, over more chunks than one tile holds."""
    from omnissm.kernels.trapezoid_ssd.triton_inputs import angles_of_chunks, readable

    inputs = inputs_of(device, l=2100, h=1, p=1, n=2, s=1, dtype=torch.float64)
    names = ("x", "log_decay", "gamma", "beta", "theta", "B", "C", "ssm", "phi", "B_bias", "C_bias", "D")
    tensors = [inputs[name] for name in names]
    tensors[5:7] = [part.flatten(1, 2) for part in tensors[5:7]]
    found = angles_of_chunks(readable(*tensors, None, None), 2)
    steps = inputs["theta"][:, :, None] * (inputs["gamma"] + inputs["beta"])[..., None]
    expected = inputs["phi"][:, :, None] / torch.pi + steps.cumsum(1).transpose(1, 2)[:, :, 1::2]
    apart = (found[:, :, 1:] - expected).remainder(2)
    assert torch.minimum(apart, 2 - apart).max() < 1e-11
    assert found.min() >= 0
    assert found.max() < 2
