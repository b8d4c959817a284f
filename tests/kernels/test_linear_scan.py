"""`linear_scan`: facts of the recurrence, torch's transforms, packing, splits."""

import pytest
import torch

from omnissm.kernels import BackendError, linear_scan
from omnissm.kernels.linear_scan.spec import SPEC
from omnissm.kernels.testing import check_op, run_with_gradients


def random_inputs(device, b=2, l=10, d=3, dtype=torch.float32):  # noqa: E741
    a = torch.rand(b, l, d, device=device, dtype=dtype)
    return a, torch.randn(b, l, d, device=device, dtype=dtype)


def test_geometric_series(backend, device):
    """a = 1/2, b = 1 from zero: h_t = 2 - 2^-t."""
    half, one = torch.full((1, 9, 1), 0.5, device=device), torch.ones(1, 9, 1, device=device)
    states, final = linear_scan(half, one, backend=backend)
    expected = 2 - 0.5 ** torch.arange(9.0, device=device)
    torch.testing.assert_close(states[0, :, 0], expected)
    torch.testing.assert_close(final, states[:, -1])


def test_decay_one_is_the_cumulative_sum_and_zero_forgets(backend, device):
    _, b = random_inputs(device, l=37)
    one = torch.ones(3, device=device)
    torch.testing.assert_close(linear_scan(one, b, backend=backend)[0], b.cumsum(1))
    assert torch.equal(linear_scan(0 * one, b, backend=backend)[0], b)


@pytest.mark.parametrize("cut", [1, 4, 9])
@pytest.mark.parametrize("reverse", [False, True])
def test_any_cut_carries_state_and_gradients(cut, reverse, backend, device):
    a, b = random_inputs(device)
    h0 = torch.randn(2, 3, device=device)

    def whole(a, b, h0):
        return linear_scan(a, b, h0, reverse=reverse, backend=backend)

    def in_two(a, b, h0):
        order = (slice(cut, None), slice(0, cut)) if reverse else (slice(0, cut), slice(cut, None))
        first, state = linear_scan(a[:, order[0]], b[:, order[0]], h0, reverse=reverse, backend=backend)
        second, state = linear_scan(a[:, order[1]], b[:, order[1]], state, reverse=reverse, backend=backend)
        return torch.cat([second, first] if reverse else [first, second], dim=1), state

    inputs = {"a": a, "b": b, "h0": h0}
    cotangents = {"states": torch.randn(2, 10, 3, device=device), "final": torch.randn(2, 3, device=device)}
    expected = run_with_gradients(whole, inputs, ("states", "final"), cotangents)
    for name, value in run_with_gradients(in_two, inputs, ("states", "final"), cotangents).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_reverse_is_flip_scan_flip(backend, device):
    a, b = random_inputs(device, l=21)
    forward, final = linear_scan(a.flip(1), b.flip(1), backend=backend)
    backward, last = linear_scan(a, b, reverse=True, backend=backend)
    assert torch.equal(backward, forward.flip(1))
    assert torch.equal(last, final)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_equals_separate(reverse, backend, device):
    lengths = [1, 7, 1, 20, 4]
    a, b = random_inputs(device, b=1, l=sum(lengths))
    h0 = torch.randn(1, 3, device=device)
    seq_idx = torch.repeat_interleave(torch.arange(5, device=device), torch.tensor(lengths, device=device))[None]
    inputs = {"a": a, "b": b, "h0": h0}
    cotangents = {"states": torch.randn_like(b), "final": torch.randn(1, 3, device=device)}

    def packed(a, b, h0):
        return linear_scan(a, b, h0, seq_idx=seq_idx, reverse=reverse, backend=backend)

    def separate(a, b, h0):
        met_first, met_last = (4, 0) if reverse else (0, 4)
        results = [
            linear_scan(a_part, b_part, h0 if k == met_first else None, reverse=reverse, backend=backend)
            for k, (a_part, b_part) in enumerate(zip(a.split(lengths, 1), b.split(lengths, 1)))
        ]
        return torch.cat([states for states, _ in results], 1), results[met_last][1]

    expected = run_with_gradients(separate, inputs, ("states", "final"), cotangents)
    got = run_with_gradients(packed, inputs, ("states", "final"), cotangents)
    for name, value in got.items():
        if name != "da":
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    # Where a sequence starts the decay has nothing to act on.
    inner = torch.ones(sum(lengths), dtype=torch.bool, device=device)
    starts = torch.tensor(lengths, device=device).cumsum(0)[:-1]
    inner[starts - 1 if reverse else starts] = False
    torch.testing.assert_close(got["da"][:, inner], expected["da"][:, inner])
    assert not got["da"][:, ~inner].any()


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_triton_parts_agree(parts, reverse, device):
    """Cutting a sequence into parts is a matter of speed only."""
    pytest.importorskip("triton")
    from omnissm.kernels import available_backends

    if available_backends(device)["triton"]:
        pytest.skip("Triton does not run here")
    from omnissm.kernels.linear_scan.triton_impl import _backward, _forward

    a, b = random_inputs(device, b=1, l=450)
    h0 = torch.randn(1, 3, device=device)
    states, final = _forward(a, b, h0, reverse, parts)
    expected, last = linear_scan(a.double(), b.double(), h0.double(), reverse=reverse, backend="reference")
    torch.testing.assert_close(states, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, last.float(), rtol=1e-5, atol=1e-5)
    dstates, dfinal = torch.randn_like(states), torch.randn_like(final)
    for one, whole in zip(
        _backward(a, states, h0, dstates, dfinal, reverse, parts),
        _backward(a, states, h0, dstates, dfinal, reverse, 1),
    ):
        torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 63, 64, 65, 127, 128, 129, 197, 300, 1000])
def test_lengths_chunked(length, device):
    check_op(SPEC, {"b": 2, "l": length, "d": 3}, "chunked", torch.float32, device)
    check_op(SPEC, {"b": 1, "l": length, "d": 3, "reverse": True}, "chunked", torch.float32, device)


def test_wide_rows_take_the_serial_path_on_cpu(device):
    check_op(SPEC, {"b": 2, "l": 9, "d": 4096}, "chunked", torch.float32, device)
    check_op(SPEC, {"b": 2, "l": 9, "d": 4096, "reverse": True, "state": False}, "chunked", torch.float32, device)


@pytest.mark.parametrize("decay", [1e-30, 1 - 1e-6, -0.9])
def test_regimes_of_decay(decay, backend, device):
    """Vanishing, hardly any and alternating decay stay finite and exact."""
    b = torch.randn(1, 300, 2, device=device)
    a = torch.full((2,), decay, device=device)
    expected, _ = linear_scan(a.double(), b.double(), backend="reference")
    states, _ = linear_scan(a, b, backend=backend)
    torch.testing.assert_close(states.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_complex(reverse, device):
    a = torch.polar(torch.rand(2, 30, 3), 6 * torch.rand(2, 30, 3)).to(device)
    b = torch.randn(2, 30, 3, dtype=torch.complex64, device=device)
    inputs = {"a": a, "b": b, "initial_state": torch.randn(2, 3, dtype=torch.complex64, device=device)}
    cotangents = {"states": torch.randn_like(b), "final": torch.randn_like(b[:, 0])}

    def scan(backend):
        return lambda **kw: linear_scan(**kw, reverse=reverse, backend=backend)

    expected = run_with_gradients(scan("reference"), inputs, ("states", "final"), cotangents)
    for name, value in run_with_gradients(scan("chunked"), inputs, ("states", "final"), cotangents).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    mixed, final = linear_scan(a, b.real, reverse=reverse)
    assert mixed.dtype == final.dtype == torch.complex64
    with pytest.raises(BackendError, match="Triton takes real tensors only"):
        linear_scan(a, b, backend="triton")


def test_wider_decay_than_input(backend, device):
    """float32 decays with bfloat16 inputs: states in bfloat16, the carried state in float32."""
    a, b = random_inputs(device, l=200)
    a = 0.99 + 0.01 * a  # would round to 0.99 and 1 in bfloat16
    states, final = linear_scan(a, b.bfloat16(), backend=backend)
    expected, last = linear_scan(a.double(), b.bfloat16().double(), backend="reference")
    assert (states.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(final.double(), last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states.double(), expected, rtol=1e-2, atol=1e-2)


def test_no_positions(backend, device):
    a = torch.rand(2, 0, 3, device=device, requires_grad=True)
    h0 = torch.randn(2, 3, device=device, requires_grad=True)
    states, final = linear_scan(a, a, h0, backend=backend)
    assert states.shape == (2, 0, 3)
    assert torch.equal(final, h0)
    assert torch.equal(torch.autograd.grad(final.sum(), h0)[0], torch.ones_like(h0))
    assert not linear_scan(a, a, backend=backend)[1].any()


def test_causal_to_the_bit(backend, device):
    """States before a position do not move when the position does."""
    a, b = random_inputs(device, l=100)
    states, _ = linear_scan(a, b, backend=backend)
    b[:, 60:] += 1
    a[:, 60:] = 0.3
    changed, _ = linear_scan(a, b, backend=backend)
    assert torch.equal(states[:, :60], changed[:, :60])
    assert not torch.equal(states[:, 60:], changed[:, 60:])


def test_gradient_of_the_final_state_alone(backend, device):
    a, b = random_inputs(device, l=6)
    b.requires_grad_()
    (db,) = torch.autograd.grad(linear_scan(a, b, backend=backend)[1].sum(), b)
    expected = torch.cat([a.flip(1).cumprod(1).flip(1)[:, 1:], torch.ones_like(a[:, :1])], 1)
    torch.testing.assert_close(db, expected)


def test_wrong_shapes(device):
    a, b = random_inputs(device)
    with pytest.raises(ValueError, match=r"`a` has l=9, expected 10 \(from `b`\); `a` is \(b, l, d\|1\)"):
        linear_scan(a[:, :9], b)
    with pytest.raises(ValueError, match="`initial_state` has d=4, expected 3"):
        linear_scan(a, b, torch.zeros(2, 4, device=device))
    with pytest.raises(ValueError, match=r"`a` must have 3 dimensions"):
        linear_scan(a[0], b)
    with pytest.raises(TypeError, match="`b` must have a floating or complex dtype, got torch"):
        linear_scan(a, b.long())


def test_vmap(backend, device):
    a, b = torch.rand(4, 2, 7, 3, device=device), torch.randn(4, 2, 7, 3, device=device)
    h0 = torch.randn(4, 2, 3, device=device)

    def scan(a, b, h0=None):
        return linear_scan(a, b, h0, backend=backend)

    expected = [scan(*one) for one in zip(a, b, h0)]
    for k, output in enumerate(torch.func.vmap(scan)(a, b, h0)):
        torch.testing.assert_close(output, torch.stack([one[k] for one in expected]))
    shared = torch.func.vmap(scan, in_dims=(None, 1))(a[0], b.transpose(0, 1))[0]
    torch.testing.assert_close(shared, torch.stack([scan(a[0], one)[0] for one in b]))
    per_channel = torch.func.vmap(scan, in_dims=(0, None))(a[:, 0, 0], b[0])[0]
    torch.testing.assert_close(per_channel, torch.stack([scan(one, b[0])[0] for one in a[:, 0, 0]]))


def test_functional_gradients_per_sample(backend, device):
    """grad under vmap, with decays shared by the samples: one gradient per sample."""
    b = torch.randn(4, 1, 7, 3, device=device)
    for a in (torch.rand(3, device=device), torch.rand(1, 7, 1, device=device), torch.rand(1, 7, 3, device=device)):

        def loss(a, b):
            return linear_scan(a, b, backend=backend)[0].square().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(a, b)
        torch.testing.assert_close(each, torch.stack([torch.func.grad(loss)(a, one) for one in b]))


def test_second_derivative_in_triton_names_the_way_out(device):
    from omnissm.kernels import available_backends

    if available_backends(device)["triton"]:
        pytest.skip("Triton does not run here")
    a, b = random_inputs(device)
    b.requires_grad_()
    (db,) = torch.autograd.grad(linear_scan(a, b, backend="triton")[0].square().sum(), b, create_graph=True)
    with pytest.raises(BackendError, match="no second derivative in Triton; call it with backend='chunked'"):
        db.sum().backward()


def test_autocast_changes_nothing(backend, device):
    a, b = random_inputs(device)
    with torch.autocast(device.type, torch.bfloat16):
        states, final = linear_scan(a, b, backend=backend)
    assert states.dtype == final.dtype == torch.float32
    torch.testing.assert_close(states, linear_scan(a, b, backend=backend)[0])


def test_opcheck(device):
    """Schema, fake tensors and dynamic shapes of the custom ops."""
    from omnissm.kernels import available_backends
    from omnissm.kernels.linear_scan import chunked

    a, b = random_inputs(device, l=5)
    h0, dstates = torch.randn(2, 3, device=device), torch.randn_like(b)
    torch.library.opcheck(chunked._scan, (a, b, h0, False))
    if available_backends(device)["triton"] is None:
        from omnissm.kernels.linear_scan import triton_impl

        torch.library.opcheck(triton_impl._forward, (a, b, h0, False, 0))
        torch.library.opcheck(triton_impl._backward, (a, b, None, dstates, h0, True, 0))


def test_export_with_dynamic_length(device):
    class Scan(torch.nn.Module):
        def forward(self, a, b):
            return linear_scan(a, b)

    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Scan(), random_inputs(device, l=6), dynamic_shapes=({1: length}, {1: length}))
    a, b = random_inputs(device, l=23)
    for got, expected in zip(program.module()(a, b), linear_scan(a, b)):
        torch.testing.assert_close(got, expected)


def test_compile_once_for_all_lengths(device):
    """Third and later lengths reuse the code; gradients come out the same."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda a, b: linear_scan(a, b)[0], backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 9, 30):
        a, b = (x.requires_grad_() for x in random_inputs(device, l=length))
        got = torch.autograd.grad(compiled(a, b).square().sum(), (a, b))
        expected = torch.autograd.grad(linear_scan(a, b)[0].square().sum(), (a, b))
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_million_positions(device):
    """Offsets beyond 2^31 elements are the GPU's business; here: no quadratic cost, no loss of precision."""
    a = torch.full((1, 1_000_000, 1), 0.999, device=device)
    b = torch.ones_like(a)
    states, final = linear_scan(a, b)
    assert final.item() == pytest.approx(1000, rel=1e-4)
    assert torch.isfinite(states).all()
