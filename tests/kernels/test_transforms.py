"""Batching rules and the ways to call an autograd function."""

import re
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from omnissm import kernels
from omnissm.kernels import linear_scan, selective_scan, ssd
from omnissm.kernels.transforms import apply, call, fold, operator, unfold


class Square(torch.autograd.Function):
    """x^2 with a gradient that counts its calls."""

    generate_vmap_rule = True
    calls = 0

    @staticmethod
    def forward(x, factor):
        return factor * x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, dy):
        Square.calls += 1
        (x,) = ctx.saved_tensors
        return 2 * ctx.factor * x * dy, None


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_and_not_taken_for_zero(grad):
    x = torch.randn(3)
    with torch.set_grad_enabled(grad), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        apply(Square, forward_ad.make_dual(x, x), 2)


def test_ops_called_at_once_leave_negation_to_torch():
    found = []

    @operator("negation_probe")
    def probe(x: torch.Tensor) -> torch.Tensor:
        found.append(x.is_neg())
        return x.clone()

    with torch.no_grad():
        x = torch.randn(3, dtype=torch.complex64)
        assert torch.equal(call(probe, x.conj().imag), -x.imag)
    assert found == [False]


def test_kernels_read_no_view_that_negates(device):
    """Its memory has the numbers times -1."""
    pytest.importorskip("triton")
    a, b = (torch.rand(1, 5, 3, device=device) for _ in "ab")
    turned = torch._neg_view(b)  # contiguous, unlike the imaginary part of a conjugate
    assert turned.is_neg()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for _ in range(4):  # the third one is replayed on a GPU
                found = linear_scan(a, turned, backend="triton")[0]
                torch.testing.assert_close(found, linear_scan(a, -b, backend="reference")[0])


def test_fold_puts_the_mapped_dimension_into_the_batch():
    x = torch.arange(24.0).view(2, 3, 4)  # mapped along dim 1: three instances with batch 2
    folded = fold(x, 1, 3)
    assert folded.shape == (6, 4)
    assert torch.equal(unfold(folded, 3), x.movedim(1, 0))
    shared = fold(x[:, 0], None, 5)
    assert torch.equal(unfold(shared, 5), x[:, 0].expand(5, 2, 4))
    assert fold(None, None, 3) is None


def test_apply_is_the_same_function_in_every_mode():
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    expected, slope = 2 * x.detach() ** 2, 4 * x.detach()
    with torch.no_grad():
        assert torch.equal(apply(Square, x, 2), expected)
    before = Square.calls
    assert torch.equal(torch.autograd.grad(apply(Square, x, 2).sum(), x)[0], slope)
    assert Square.calls == before + 1
    plain = x.detach()
    assert torch.equal(torch.func.grad(lambda x: apply(Square, x, 2).sum())(plain), slope)
    assert torch.equal(torch.func.vmap(torch.func.grad(lambda x: apply(Square, x, 2)))(plain), slope)
    assert Square.calls > before + 2

    (first,) = torch.autograd.grad(apply(Square, x, 2).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], torch.full((3,), 4.0))


@pytest.mark.parametrize("enabled", [True, False], ids=["gradients", "no_grad"])
def test_derivatives_that_are_lacking_are_not_zero(enabled):
    x, log_decay, B = torch.randn(1, 9, 2, 3), -torch.rand(1, 9, 2), torch.randn(1, 9, 1, 4)
    with torch.set_grad_enabled(enabled):
        _, change = torch.func.jvp(lambda x: ssd(x, log_decay, B, B, backend="reference")[0], (x,), (2 * x,))
        torch.testing.assert_close(change, 2 * ssd(x, log_decay, B, B)[0])
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(lambda x: ssd(x, log_decay, B, B)[0], (x,), (x,))
        many = torch.func.vmap(lambda x: ssd(x, log_decay, B, B)[0])(torch.stack([x, -x]))
    torch.testing.assert_close(many, torch.stack([change, -change]) / 2)


def test_compiles_whole_where_nothing_needs_a_gradient():
    """Frozen parameters in grad mode: the context of the autograd function is never used."""
    x, log_decay, B = torch.randn(1, 9, 2, 3), -torch.rand(1, 9, 2), torch.randn(1, 9, 1, 4)
    expected, _ = ssd(x, log_decay, B, B)
    compiled = torch.compile(lambda *tensors: ssd(*tensors)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, log_decay, B, B), expected)


def test_an_exported_module_runs_where_gradients_are_on():
    """The graph calls the op itself; its buffers must not be recorded, and the gradient it lacks is not silent."""

    class Scan(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log = torch.nn.Parameter(torch.zeros(300, 16))

        def forward(self, u):
            maps = u[..., None, :16]
            return selective_scan(u, torch.ones_like(u), -self.A_log.exp(), maps, maps)[0]

    module, u = Scan(), torch.randn(1, 9, 300)
    exported = torch.export.export(module, (u,)).module()
    y = exported(u)
    torch.testing.assert_close(y, module(u))
    with pytest.raises(RuntimeError, match="train the module itself"):
        y.sum().backward()


def test_every_operator_has_shapes_without_data():
    """torch.compile and torch.export ask the fake kernel of an op; without one they would run the op itself."""
    texts = [path.read_text() for path in Path(kernels.__file__).parent.rglob("*.py")]
    defined = {name for text in texts for name in re.findall(r'@operator\(\s*"(\w+)"', text)}
    known = {name for text in texts for name in re.findall(r'register_fake\("ssm::(\w+)"[,)]', text)}
    assert len(defined) > 30
    assert defined <= known
