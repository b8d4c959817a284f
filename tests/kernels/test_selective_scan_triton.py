"""`selective_scan` in Triton: parts, packing, cuts, what it refuses, torch's transforms. Short, for the interpreter."""

import pytest
import torch

from omnissm.kernels import BackendError, available_backends, selective_scan
from omnissm.kernels.selective_scan.spec import SPEC
from omnissm.kernels.testing import check_op, relative_error, run_with_gradients

OUTPUTS = ("y", "final_state")


@pytest.fixture(autouse=True)
def _where_triton_runs(device) -> None:
    if reason := available_backends(device)["triton"]:
        pytest.skip(reason)


def inputs_of(device, dtype=torch.float32, **size):
    generator = torch.Generator(device).manual_seed(3)
    size = {"b": 1, "l": 9, "d": 3, "n": 2} | size
    return SPEC.make_inputs(**size, dtype=dtype, device=device, generator=generator)


def on_triton(**arguments):
    return selective_scan(**arguments, backend="triton")


@pytest.mark.parametrize(
    "size",
    [
        {"d": 1, "n": 1},
        {"d": 33, "n": 7, "l": 5},
        {"d": 2, "n": 64, "l": 6},
        {"d": 1, "n": 256, "l": 3},
        {"d": 5, "n": 16, "l": 7, "gate": True, "skip": False},
    ],
    ids=str,
)
def test_sizes(size, device):
    check_op(SPEC, {"b": 1, "l": 4, **size}, "triton", torch.float32, device)


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_parts_agree(packed, device):
    """Cutting a sequence into parts is a matter of speed only."""
    from omnissm.kernels.selective_scan.triton_impl import _backward, _forward

    inputs = inputs_of(device, l=70, d=1, state=True, gate=True, packed=packed)
    if packed:  # a border in the second part only
        inputs["seq_idx"] = (torch.arange(70, device=device) >= 66).int()[None]
    scanned = [inputs[name] for name in ("u", "dt", "A", "B", "C", "D", "z")]
    scanned[3], scanned[4] = scanned[3][:, :, None], scanned[4][:, :, None]
    index = inputs.get("seq_idx")
    whole = _forward(*scanned, inputs["initial_state"], index, True, False, 1)
    cut = _forward(*scanned, inputs["initial_state"], index, True, False, 2)
    torch.testing.assert_close(cut[:2], whole[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cut[2][:2], whole[2][:2], rtol=1e-5, atol=1e-5)
    dy, dfinal = torch.randn_like(whole[0]), torch.randn_like(whole[1])
    for one, other in zip(
        _backward(*scanned, index, whole[2], dy, dfinal, 2), _backward(*scanned, index, whole[2], dy, dfinal, 1)
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_cut_and_packed_equal_separate(device):
    """Two halves of one row: joined by the state, or apart as packed sequences."""
    inputs = inputs_of(device, l=14, state=True)
    seq_idx = (torch.arange(14, device=device) >= 6).int()[None]

    def in_two(handed_on, u, dt, B, C, initial_state, A, D, **_):
        head, tail = zip(*((x[:, :6], x[:, 6:]) for x in (u, dt, B, C)))
        (u0, dt0, B0, C0), (u1, dt1, B1, C1) = head, tail
        left, state = on_triton(u=u0, dt=dt0, A=A, B=B0, C=C0, D=D, initial_state=initial_state)
        state = state if handed_on else None
        right, final = on_triton(u=u1, dt=dt1, A=A, B=B1, C=C1, D=D, initial_state=state)
        return torch.cat([left, right], 1), final

    cotangents = {"y": torch.randn_like(inputs["u"]), "final_state": torch.randn_like(inputs["initial_state"])}
    for handed_on, options in ((True, {}), (False, {"seq_idx": seq_idx})):
        found = run_with_gradients(lambda o=options, **kw: on_triton(**kw, **o), inputs, OUTPUTS, cotangents)
        expected = run_with_gradients(lambda h=handed_on, **kw: in_two(h, **kw), inputs, OUTPUTS, cotangents)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_infinity_stays_in_its_sequence_and_row(device):
    inputs = inputs_of(device, b=2, l=10)
    seq_idx = (torch.arange(10, device=device) >= 6).int().expand(2, -1)
    y, final = on_triton(**inputs, seq_idx=seq_idx)
    inputs["u"][0, :6] = torch.inf
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if torch.is_tensor(x)}
    changed, changed_final = on_triton(**(inputs | leaves), seq_idx=seq_idx)
    assert torch.equal(changed[:, 6:], y[:, 6:])
    assert torch.equal(changed[1], y[1])
    assert torch.equal(changed_final, final)
    (du,) = torch.autograd.grad(changed[:, 6:].sum(), leaves["u"])
    assert torch.isfinite(du[:, 6:]).all()
    assert torch.isfinite(du[1]).all()


@pytest.mark.parametrize("length", [pytest.param(150), pytest.param(4096, marks=pytest.mark.gpu)])
def test_slow_decay_keeps_its_digits(length, device):
    """exp(dt A) of 1 - 1e-6, rounded to float32 at each step, would be off by 1e-4 after some thousand steps."""
    inputs = inputs_of(device, l=length, d=2, n=1, state=True)
    inputs |= {"dt": torch.full_like(inputs["dt"], 1e-6), "A": -torch.ones_like(inputs["A"])}
    wide = {name: x.double() if torch.is_tensor(x) else x for name, x in inputs.items()}
    expected = selective_scan(**wide, backend="chunked")[1]
    assert relative_error(on_triton(**inputs)[1], expected) < 1e-6 * (1 + length / 4096)


def test_what_triton_refuses(device):
    inputs = inputs_of(device, complex_rates=True)
    with pytest.raises(BackendError, match="Triton takes real tensors only, got a complex `A`"):
        on_triton(**inputs)
    with pytest.raises(BackendError, match="Triton takes n up to 256, got n=257"):
        on_triton(**inputs_of(device, l=1, n=257))


def test_second_derivative_names_the_way_out(device):
    inputs = inputs_of(device, l=2)
    inputs["u"].requires_grad_()
    (du,) = torch.autograd.grad(on_triton(**inputs)[0].square().sum(), inputs["u"], create_graph=True)
    with pytest.raises(BackendError, match="no second derivative in Triton; call it with backend='chunked'"):
        du.sum().backward()


def test_gradients_per_sample(device):
    inputs = {name: x for name, x in inputs_of(device, l=3).items() if torch.is_tensor(x)}
    stacked = torch.stack([inputs["u"], 2 * inputs["u"]])

    def loss(A, u):
        return on_triton(**(inputs | {"A": A, "u": u}))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(inputs["A"], stacked)
    expected = torch.stack([torch.func.grad(loss)(inputs["A"], u) for u in stacked])
    torch.testing.assert_close(found, expected)


def test_opcheck(device):
    from omnissm.kernels.selective_scan.triton_impl import _backward, _forward

    inputs = inputs_of(device, l=3, state=True, g=1)
    scanned = [inputs[name] for name in ("u", "dt", "A", "B", "C", "D")]
    y, final, saved = (x.clone() for x in _forward(*scanned, None, inputs["initial_state"], None, True, False, 0))
    torch.library.opcheck(_forward, (*scanned, None, None, None, False, True, 0))
    torch.library.opcheck(_backward, (*scanned, None, None, saved, y, final, 0))


def test_compile_once_for_all_lengths(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(on_triton, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 9, 12):
        inputs = inputs_of(device, l=length, gate=True, packed=True)
        cotangents = {"y": torch.randn_like(inputs["u"])}
        expected = run_with_gradients(on_triton, inputs, OUTPUTS, cotangents)
        for name, value in run_with_gradients(compiled, inputs, OUTPUTS, cotangents).items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert counter.frame_count == 1
