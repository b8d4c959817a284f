"""The one-kernel forms of the steps against their torch path, pools of states and CUDA graphs."""

import math

import pytest
import torch

from omnissm.kernels import (
    available_backends,
    conv_step,
    conv_step_,
    selective_step,
    selective_step_,
    ssd_rates,
    ssd_step,
    ssd_step_,
    use_backend,
)

INDICES = [None, [2, 0, -1, 4], [-1, -1, 0, 3], [-1, -1, -1, -1]]


@pytest.fixture(autouse=True)
def _where_triton_runs(device) -> None:
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)


def ssd_inputs(device, dtype, slots=4, **options):
    like = {"device": device, "dtype": torch.float32}
    inputs = {
        "x": torch.randn(4, 6, 5, **like).to(dtype),
        "log_decay": -torch.rand(4, 6, **like),
        "B": torch.randn(4, 2, 9, **like).to(dtype),
        "C": torch.randn(4, 2, 9, **like).to(dtype),
        "state": torch.randn(slots, 6, 5, 9, **like),
    }
    if options:
        inputs |= {"weight": torch.rand(4, 6, **like), "D": torch.randn(6, **like)}
    return inputs


def selective_inputs(device, dtype, slots=4, **options):
    like = {"device": device, "dtype": torch.float32}
    inputs = {
        "u": torch.randn(4, 6, **like).to(dtype),
        "dt": torch.rand(4, 6, **like),
        "A": -torch.rand(6, 5, **like),
        "B": torch.randn(4, 2, 5, **like).to(dtype),
        "C": torch.randn(4, 2, 5, **like).to(dtype),
        "state": torch.randn(slots, 6, 5, **like),
    }
    if options:
        inputs |= {"D": torch.randn(6, **like), "z": torch.randn(4, 12, **like)[:, ::2].to(dtype)}
    return inputs


def conv_inputs(device, dtype, slots=4, **options):
    like = {"device": device, "dtype": torch.float32}
    inputs = {
        "x": torch.randn(4, 7, **like).to(dtype),
        "state": torch.randn(slots, 7, 3, **like).to(dtype),
        "weight": torch.randn(7, 4, **like),
    }
    return inputs | ({"bias": torch.randn(7, **like)} if options else {"activation": None})


STEPS = pytest.mark.parametrize(
    ("step", "in_place", "make"),
    [
        (ssd_step, ssd_step_, ssd_inputs),
        (selective_step, selective_step_, selective_inputs),
        (conv_step, conv_step_, conv_inputs),
    ],
    ids=["ssd", "selective", "conv"],
)


@STEPS
@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_the_torch_path(step, in_place, make, index, dtype, device):
    inputs = make(device, dtype, 4 if index is None else 5, further=index is None or index[0] > 0)
    if index is not None:
        inputs["state_index"] = torch.tensor(index, device=device, dtype=torch.int32)
    before = inputs["state"].clone()
    with use_backend("chunked"):
        expected, expected_state = step(**inputs)
    with use_backend("triton"):
        y, state = step(**inputs)
        assert torch.equal(inputs["state"], before)
        in_place_y = in_place(**inputs)
    limit = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, expected, **limit)
    torch.testing.assert_close(state, expected_state, **limit)
    assert torch.equal(in_place_y, y)
    assert torch.equal(inputs["state"], state)


@STEPS
def test_float64_and_gradients_take_their_paths(step, in_place, make, device):
    inputs = {name: x.double() if torch.is_tensor(x) else x for name, x in make(device, torch.float64).items()}
    with use_backend("chunked"):
        expected, _ = step(**inputs)
    with use_backend("triton"):
        torch.testing.assert_close(step(**inputs)[0], expected, rtol=1e-12, atol=1e-12)
        inputs["state"].requires_grad_()
        assert torch.autograd.grad(step(**inputs)[0].sum(), inputs["state"])[0].abs().sum() > 0


@STEPS
def test_compiles_whole(step, in_place, make, device):
    inputs = make(device, torch.float32)
    again = {name: x.clone() if torch.is_tensor(x) else x for name, x in inputs.items()}
    with use_backend("triton"), torch.no_grad():
        expected = in_place(**inputs)
        found = torch.compile(lambda **kw: in_place(**kw), fullgraph=True, backend="aot_eager")(**again)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again["state"], inputs["state"])


@pytest.mark.gpu
@STEPS
def test_cuda_graph(step, in_place, make, device):
    """A captured step advances the pool at each replay and obeys new indices."""
    inputs = make(device, torch.bfloat16, 5, further=True)
    inputs["state_index"] = torch.tensor([2, 0, -1, 4], device=device)
    in_place(**inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = in_place(**inputs)
    inputs["state_index"].copy_(torch.tensor([1, -1, 3, 2], device=device))
    expected = step(**inputs)
    graph.replay()
    assert torch.equal(y, expected[0])
    assert torch.equal(inputs["state"], expected[1])


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.01, 0.5)], ids=["open", "limited"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"])
def test_rates_are_exact_from_the_smallest_step_to_the_largest(dtype, limit, device):
    """Against float64: relative accuracy where softplus is tiny, about 1, and linear; NaN stays in its row."""
    raw = torch.linspace(-60, 60, 4 * 7, dtype=torch.float64, device=device).reshape(4, 7).to(dtype)
    wide = torch.cat([raw, raw], dim=1)  # rows lie apart, as parts of a projection do
    bias = torch.linspace(-1, 1, 7, device=device)
    A_log = torch.linspace(-2, 2, 7, device=device)
    exact = torch.log1p(torch.exp((raw.double() + bias.double()).clamp(max=700))).clamp(*limit)
    with torch.no_grad(), use_backend("triton"):
        dt, log_decay = ssd_rates(wide[:, :7], bias, A_log, limit=limit)
    assert dt.dtype == log_decay.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Above 20 a softplus is its argument, here and in torch; float32 rounds raw + bias, half a unit of 60 is 2e-6.
    rtol = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(dt.double(), exact, rtol=rtol, atol=0)
    torch.testing.assert_close(log_decay.double(), -exact * A_log.double().exp(), rtol=rtol, atol=0)
    broken = raw.clone()
    broken[1, 2] = math.nan
    with torch.no_grad(), use_backend("triton"):
        found = ssd_rates(broken, bias, A_log, limit=limit)[0]
    assert found.isnan().nonzero().tolist() == [[1, 2]]


def test_rates_have_the_gradients_of_their_definition(device):
    raw, bias, A_log = (
        torch.randn(*shape, device=device, dtype=torch.float64, requires_grad=True) for shape in [(2, 3, 4), (4,), (4,)]
    )
    assert torch.autograd.gradcheck(lambda *inputs: ssd_rates(*inputs, limit=(0.1, 3.0)), (raw, bias, A_log))


def test_rates_refuse_another_number_of_heads(device):
    with pytest.raises(ValueError, match="A_log"):
        ssd_rates(torch.zeros(2, 4, device=device), torch.zeros(4, device=device), torch.zeros(3, device=device))
