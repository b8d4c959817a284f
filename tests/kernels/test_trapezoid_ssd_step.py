"""The one-kernel form of `trapezoid_step` against its torch path: ranks, rotations, dtypes, pools of states, graphs."""

import pytest
import torch

from omnissm.kernels import TrapezoidState, available_backends, trapezoid_step, trapezoid_step_, use_backend

INDICES = [None, [2, 0, -1, 4], [-1, -1, 0, 3], [-1, -1, -1, -1]]
PARAMETERS = ("B_bias", "C_bias", "D", "x_rank")


@pytest.fixture(autouse=True)
def _where_triton_runs(device) -> None:
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)


def inputs_of(device, dtype=torch.float32, b=4, h=2, p=5, n=9, r=2, g=2, s=3, slots=None, **options):
    """Inputs of one position; `state` has `slots` rows."""
    wide = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
    slots = b if slots is None else slots
    inputs = {
        "x": torch.randn(b, h, p, **wide).to(dtype),
        "log_decay": -torch.rand(b, h, **wide),
        "gamma": torch.rand(b, h, **wide),
        "beta": torch.rand(b, h, **wide),
        "theta": torch.randn(b, s, **wide),
        "B": torch.randn(b, r, g, n, **wide).to(dtype),
        "C": torch.randn(b, r, g, n, **wide).to(dtype),
        "state": TrapezoidState(
            6 * torch.rand(slots, h, s, **wide),
            torch.randn(slots, h, p, n, **wide),
            torch.randn(slots, r, h, n, **wide),
            torch.randn(slots, h, p, **wide).to(dtype),
        ),
        "B_bias": torch.randn(h, r, n, **wide),
        "C_bias": torch.randn(h, r, n, **wide),
        "D": torch.randn(h, **wide),
        "x_rank": torch.randn(h, r, p, **wide),
    }
    return inputs | options


def copied(state):
    return TrapezoidState(*(part.clone() for part in state))


def compare(inputs, tolerance):
    """The pure and the in-place form in Triton against the torch path; angles are compared as directions."""
    before = copied(inputs["state"])
    with torch.no_grad():
        with use_backend("chunked"):
            expected, after = trapezoid_step(**inputs)
        with use_backend("triton"):
            y, state = trapezoid_step(**inputs)
            for part, old in zip(inputs["state"], before):
                assert torch.equal(part, old)
            in_place = trapezoid_step_(**inputs)
    assert y.dtype == expected.dtype
    limit = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(y, expected, **limit)
    torch.testing.assert_close(state.phi.cos(), after.phi.cos(), **limit)
    torch.testing.assert_close(state.phi.sin(), after.phi.sin(), **limit)
    for name in ("ssm", "k", "v"):
        torch.testing.assert_close(getattr(state, name), getattr(after, name), **limit, msg=name)
    assert torch.equal(in_place, y)
    for part, new, expected_part in zip(inputs["state"], state, after):
        assert torch.equal(part, new)
        assert part.dtype == expected_part.dtype


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_the_torch_path(index, dtype, device):
    inputs = inputs_of(device, dtype, slots=4 if index is None else 5)
    if index is not None:
        inputs["state_index"] = torch.tensor(index, device=device, dtype=torch.int32)
    compare(inputs, 2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("rotation", ["interleaved", "half"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"p": 1, "n": 1, "s": 0, "r": 1, "g": 1, "h": 1},
        {"p": 3, "n": 7, "s": 3, "r": 1, "g": 3, "h": 3, "b": 1},
        {"p": 7, "n": 64, "s": 32, "r": 4, "g": 1, "b": 1},
        {"p": 70, "n": 128, "s": 20, "r": 3, "g": 1, "h": 1, "b": 1},
        {"p": 20, "n": 300, "s": 150, "r": 8, "g": 1, "h": 1, "b": 1},
    ],
    ids=str,
)
def test_widths_and_ranks(sizes, rotation, device):
    compare(inputs_of(device, torch.float64, rotation=rotation, **sizes), 1e-11)


@pytest.mark.parametrize("absent", PARAMETERS)
def test_absent_parameters(absent, device):
    compare(inputs_of(device, torch.float64) | {absent: None}, 1e-11)


def test_rows_that_lie_apart_and_narrow_states(device):
    """Parts of a projection, and a state kept in 16 bits on request."""
    inputs = inputs_of(device)
    inputs["x"] = torch.randn(4, 60, device=device)[:, 7:17].unflatten(1, (2, 5))
    inputs["B"], inputs["C"] = torch.randn(4, 72, device=device).unflatten(1, (2, 2, 2, 9)).unbind(1)
    inputs["theta"] = torch.randn(4, 6, device=device)[:, ::2]
    inputs["state"] = TrapezoidState(
        inputs["state"].phi, *(part.bfloat16() for part in inputs["state"][1:3]), inputs["state"].v
    )
    compare(inputs, 1e-2)


def test_many_steps_stay_with_the_torch_path(device):
    """Angles that turn often: 60 positions with increments up to 2 pi."""
    inputs = inputs_of(device, torch.float64, b=1, h=1, g=1, r=1)
    states = [copied(inputs["state"]) for _ in range(2)]
    for _ in range(60):
        inputs["theta"] = torch.randn(1, 3, device=device, dtype=torch.float64)
        with torch.no_grad(), use_backend("triton"):
            y = trapezoid_step_(**inputs | {"state": states[0]})
        with torch.no_grad(), use_backend("chunked"):
            expected, states[1] = trapezoid_step(**inputs | {"state": states[1]})
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert ((states[0].phi >= 0) & (states[0].phi <= 6.2832)).all()


def test_gradients_take_the_torch_path(device):
    inputs = inputs_of(device)
    inputs["state"].ssm.requires_grad_()
    with use_backend("triton"):
        y, _ = trapezoid_step(**inputs)
    assert torch.autograd.grad(y.sum(), inputs["state"].ssm)[0].abs().sum() > 0


def test_nan_stays_in_its_row(device):
    inputs = inputs_of(device)
    inputs["theta"][1, 0] = float("nan")
    with torch.no_grad(), use_backend("triton"):
        y, state = trapezoid_step(**inputs)
    assert y.isnan().any(3).any(2).any(1).tolist() == [False, True, False, False]
    assert state.phi.isnan().any(2).any(1).tolist() == [False, True, False, False]


def test_compiles_whole(device):
    inputs = inputs_of(device)
    again = inputs | {"state": copied(inputs["state"])}
    with use_backend("triton"), torch.no_grad():
        expected = trapezoid_step_(**inputs)
        found = torch.compile(lambda **kw: trapezoid_step_(**kw), fullgraph=True, backend="aot_eager")(**again)
    torch.testing.assert_close(found, expected)
    for part, other in zip(again["state"], inputs["state"]):
        torch.testing.assert_close(part, other)


@pytest.mark.gpu
def test_cuda_graph(device):
    """A captured step advances the pool at each replay and obeys new indices."""
    inputs = inputs_of(device, torch.bfloat16, slots=5)
    inputs["state_index"] = torch.tensor([2, 0, -1, 4], device=device)
    trapezoid_step_(**inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = trapezoid_step_(**inputs)
    inputs["state_index"].copy_(torch.tensor([1, -1, 3, 2], device=device))
    expected = trapezoid_step(**inputs)
    graph.replay()
    assert torch.equal(y, expected[0])
    for part, other in zip(inputs["state"], expected[1]):
        assert torch.equal(part, other)
