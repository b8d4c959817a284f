"""Calls like earlier ones go straight to their autograd function, and nothing else changes."""

from collections import Counter

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from omnissm.kernels import BackendError, dispatch, ema_scan, linear_scan, ssd, transforms, use_backend

replay = pytest.importorskip("omnissm.kernels.replay")
shortcut = pytest.importorskip("omnissm.kernels.shortcut")


@pytest.fixture(autouse=True)
def _in_interpreter():
    with replay.in_interpreter():
        yield
    replay.forget()


@pytest.fixture
def chosen(monkeypatch):
    """How often an op chose each backend itself: calls that take the short way do not."""
    counts = Counter()
    original = dispatch.choose

    def choose(*arguments, **options):
        found = original(*arguments, **options)
        counts[found] += 1
        return found

    for op in (ema_scan, linear_scan, ssd):
        monkeypatch.setitem(op.__wrapped__.__globals__, "choose", choose)
    return counts


def inputs(device, dtype=torch.float32, length=5):
    return torch.rand(2, length, 3, device=device), torch.randn(2, length, 3, device=device, dtype=dtype)


def step(a, b, op=linear_scan):
    """Gradients of both tensors, and the states."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    states, final = op(a, b, backend="triton")
    return *torch.autograd.grad([states, final], [a, b], [states.detach(), final.detach()]), states.detach()


def test_the_third_call_goes_straight_and_finds_the_same(device, chosen):
    for _ in range(6):
        a, b = inputs(device)
        for one, other in zip(step(a, b), step(a, b, linear_scan.__wrapped__), strict=True):
            assert torch.equal(one, other)
    assert chosen["triton"] == 2 + 6


def test_arguments_by_name_in_any_order(device, chosen):
    for _ in range(5):
        a, b = inputs(device)
        states, _ = linear_scan(backend="triton", initial_state=None, b=b, a=a)
        torch.testing.assert_close(states, linear_scan(a, b, backend="reference")[0])
    assert chosen["triton"] == 2


@pytest.mark.parametrize("grad", [True, False])
def test_without_gradients(grad, device, chosen):
    for _ in range(5):
        a, b = inputs(device)
        with torch.set_grad_enabled(grad):
            states, final = linear_scan(a, b, backend="triton")
        assert not states.requires_grad or not grad
        torch.testing.assert_close(states, linear_scan(a, b, backend="reference")[0])
        assert torch.equal(final, states[:, -1])
    assert chosen["triton"] == 2


def test_other_kinds_take_the_long_way(device, chosen):
    a, b = inputs(device)
    for _ in range(4):
        linear_scan(a, b, backend="triton")
    others = [
        lambda: linear_scan(a[:, :4], b[:, :4], backend="triton"),
        lambda: linear_scan(a.mT.contiguous().mT, b, backend="triton"),
        lambda: linear_scan(a.double(), b.double(), backend="triton"),
        lambda: linear_scan(a, b, reverse=True, backend="triton"),
        lambda: linear_scan(a, b, torch.zeros(2, 3, device=device), backend="triton"),
        lambda: linear_scan(a.clone().requires_grad_(), b, backend="triton"),
        lambda: linear_scan(a, a, backend="triton"),
    ]
    for count, other in enumerate(others, start=3):
        other()
        assert chosen["triton"] == count


def test_errors_after_good_calls(device):
    a, b = inputs(device)
    for _ in range(4):
        linear_scan(a, b, backend="triton")
    with pytest.raises(ValueError, match="`a` has"):
        linear_scan(a[:, :4], b, backend="triton")
    with pytest.raises(TypeError, match="floating"):
        linear_scan(a, b.int(), backend="triton")
    with pytest.raises(ValueError, match="unknown backend"):
        linear_scan(a, b, backend="fastest")
    with pytest.raises(TypeError, match="`b` must be"):
        linear_scan(a, [1.0], backend="triton")


def test_backends_asked_for_between_calls(device, chosen, monkeypatch):
    a, b = inputs(device)
    with use_backend("triton"):
        for _ in range(4):
            linear_scan(a, b)
    assert chosen == {"triton": 2}
    linear_scan(a, b, backend="chunked")
    monkeypatch.setenv("SSM_BACKEND", "reference")
    linear_scan(a, b)
    assert chosen == {"triton": 2, "chunked": 1, "reference": 1}
    with use_backend("triton"):
        linear_scan(a, b)
    assert chosen["triton"] == 2


def test_autocast_makes_other_kinds(device):
    x, p = torch.randn(2, 5, 3, device=device), torch.rand(2, 5, device=device)
    for _ in range(4):
        assert ema_scan(x, p, backend="triton")[0].dtype == torch.float32
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for _ in range(4):
            assert ema_scan(x, p, backend="triton")[0].dtype == torch.bfloat16


def test_a_call_that_converts_its_arguments_takes_the_long_way(device, chosen):
    a, b = inputs(device, torch.bfloat16)
    for _ in range(4):
        linear_scan(a.bfloat16(), b, backend="triton")
    assert chosen["triton"] == 2
    for _ in range(4):
        linear_scan(a.double(), b, backend="triton")
    assert chosen["triton"] == 6


def test_packed_rows_take_the_long_way(device, chosen):
    a, b = inputs(device)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]] * 2, device=device)
    for _ in range(4):
        linear_scan(a, b, seq_idx=seq_idx, backend="triton")
    assert chosen["triton"] == 4


def test_some_gradients_only(device):
    given = {name: torch.randn(1, 4, 2, 3, device=device) for name in ("x", "B", "C")}
    given["log_decay"], given["D"] = -torch.rand(1, 4, 2, device=device), torch.randn(2, device=device)

    def gradients(wanted, take, op=ssd):
        leaves = {name: one.detach().requires_grad_(name in wanted) for name, one in given.items()}
        found = op(**leaves, backend="triton")[take]
        return torch.autograd.grad(found.square().sum(), [leaves[name] for name in wanted], allow_unused=True)

    for wanted in (["x"], ["D", "B"], ["x", "B", "log_decay", "D"]):
        for take in (0, 1):
            expected = gradients(wanted, take, ssd.__wrapped__)
            for _ in range(4):
                for one, other in zip(gradients(wanted, take), expected, strict=True):
                    assert (one is None and other is None) or torch.equal(one, other)


def test_saved_tensors_may_come_back_with_other_strides(device):
    a, b = inputs(device)
    a = a.mT.contiguous().mT
    expected = step(a, b)
    for _ in range(3):
        step(a, b)
    for _ in range(3):
        with saved_tensors_hooks(lambda one: one.contiguous().clone(), lambda one: one):
            found = step(a, b)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls(reentrant, device):
    a, b = inputs(device)
    a, b = a.requires_grad_(), b.requires_grad_()

    def run(a, b):
        return linear_scan(a, b, backend="triton")[0]

    expected = torch.autograd.grad(run(a, b).sum(), [a, b])
    for _ in range(4):
        x, y = a.detach().requires_grad_(), b.detach().requires_grad_()
        checkpoint(run, x, y, use_reentrant=reentrant).sum().backward()
        assert torch.equal(x.grad, expected[0])
        assert torch.equal(y.grad, expected[1])


def test_a_graph_is_used_again(device):
    a, b = inputs(device)
    for _ in range(4):
        x = b.detach().requires_grad_()
        states, _ = linear_scan(a, x, backend="triton")
        first = torch.autograd.grad(states.sum(), x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(states.sum(), x)[0], first)


def test_second_derivatives_name_the_way_out(device):
    a, b = inputs(device)
    for _ in range(4):
        x = b.detach().requires_grad_()
        states, _ = linear_scan(a, x, backend="triton")
        (dx,) = torch.autograd.grad(states.square().sum(), x, create_graph=True)
        with pytest.raises(BackendError, match="chunked"):
            torch.autograd.grad(dx.sum(), x)


def test_transforms_see_calls_of_known_kinds(device):
    a, b = inputs(device)

    def loss(b):
        return linear_scan(a, b, backend="triton")[0].square().sum()

    for _ in range(4):
        x = b.detach().requires_grad_()
        (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(b), expected)
    many = torch.stack([b, 2 * b])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many), torch.stack([expected, 2 * expected]))


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_and_not_taken_for_zero(grad, device):
    a, b = inputs(device)
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            linear_scan(a, b, backend="triton")
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            linear_scan(a, forward_ad.make_dual(b, b), backend="triton")


def test_views_that_negate_take_the_long_way(device, chosen):
    """Their memory has the numbers times -1, and kernels read memory."""
    a, b = inputs(device)
    for _ in range(4):
        linear_scan(a, b, backend="triton")
    turned = torch.complex(a, b).conj().imag  # a view, unlike -b
    strided = linear_scan(a, torch.complex(a, b).imag, backend="triton")[0]
    before = chosen["triton"]
    for _ in range(4):
        assert torch.equal(linear_scan(a, turned, backend="triton")[0], -strided)
    assert chosen["triton"] == before + 4


def test_ops_called_at_once_leave_negation_to_torch(device):
    found = []

    @transforms.operator("negation_probe")
    def probe(x: torch.Tensor) -> torch.Tensor:
        found.append(x.is_neg())
        return x.clone()

    with torch.no_grad():
        x = torch.randn(3, dtype=torch.complex64, device=device)
        assert torch.equal(transforms.call(probe, x.conj().imag), -x.imag)
    assert found == [False]


def test_saved_tensors_may_come_back_with_fewer_digits(device):
    a, b = inputs(device)
    for _ in range(4):
        step(a, b)
    with saved_tensors_hooks(lambda one: one.double(), lambda one: one):
        found = step(a, b, linear_scan)
    for one, other in zip(found, step(a, b, linear_scan.__wrapped__), strict=True):
        torch.testing.assert_close(one, other, check_dtype=False)


def test_an_error_on_the_way_leaves_nothing_behind(device, monkeypatch):
    a, b = inputs(device)
    linear_scan(a, b, backend="triton")
    with monkeypatch.context() as patch:
        patch.setitem(linear_scan.__wrapped__.__globals__, "choose", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            linear_scan(a, b, backend="triton")
    assert shortcut.watching.applied is None
    for _ in range(3):
        states, _ = linear_scan(a, b, backend="triton")
        torch.testing.assert_close(states, linear_scan(a, b, backend="reference")[0])


def test_what_is_remembered_is_bounded(device, monkeypatch):
    monkeypatch.setattr(shortcut, "_MOST", 3)
    for length in range(1, 8):
        for _ in range(3):
            a, b = inputs(device, length=length)
            states, _ = linear_scan(a, b, backend="triton")
            torch.testing.assert_close(states, linear_scan(a, b, backend="reference")[0])
    assert len(shortcut._plans) <= 3
