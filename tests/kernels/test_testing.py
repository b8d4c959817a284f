"""The check itself: it passes what is right and fails what is wrong."""

import pytest
import torch

from omnissm.kernels.testing import OpSpec, check_op, relative_error


def scale(x, factor, *, backend="auto", wrong=""):
    """y = factor x, with faults on request."""
    if backend == "reference" or wrong == "":
        return factor * x
    if wrong == "value":
        return factor * x * 1.001
    if wrong == "gradient":
        return factor * x.detach() + x - x.detach()
    if wrong == "no gradient":
        return factor * x.detach()
    return factor * x + (torch.nan if wrong == "nan" else 0)


def make_inputs(n, *, dtype, device, generator):
    return {"x": torch.randn(n, dtype=dtype, device=device, generator=generator), "factor": torch.tensor(2.0).to(dtype)}


SPEC = OpSpec(op=scale, make_inputs=make_inputs, outputs=("y",), test_sizes=({"n": 5},))


def test_right_op_passes():
    errors = check_op(SPEC, {"n": 5}, "chunked", torch.float32, "cpu")
    assert set(errors) == {"y", "dx", "dfactor"}
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize(("wrong", "where"), [("value", "y"), ("gradient", "dx"), ("no gradient", "dx"), ("nan", "y")])
def test_wrong_op_fails(wrong, where):
    with pytest.raises(AssertionError, match=rf"scale: `{where}` of backend 'chunked' is off by"):
        check_op(SPEC, {"n": 5}, "chunked", torch.float32, "cpu", wrong=wrong)


def test_looser_limit_applies_to_its_tensor_and_dtype_only():
    spec = OpSpec(
        op=scale, make_inputs=make_inputs, outputs=("y",), test_sizes=(), tolerance={("y", torch.float32): 1e-2}
    )
    assert spec.limit("y", torch.float32) == 1e-2
    assert spec.limit("y", torch.float64) == 1e-10
    with pytest.raises(AssertionError, match="`dx`"):
        check_op(spec, {"n": 5}, "chunked", torch.float32, "cpu", wrong="value")


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx((0.5 / 12.5) ** 0.5)
    assert relative_error(torch.tensor([1e-3]), torch.zeros(1)) == pytest.approx(1e-3)
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1)) == float("inf")
    with pytest.raises(ValueError, match="Shapes differ"):
        relative_error(torch.zeros(2), torch.zeros(1))
