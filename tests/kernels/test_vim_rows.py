"""`vim_rows`: against its parts in float64, and what it leaves to them."""

import gc

import pytest
import torch
import torch.nn.functional as F

from omnissm.kernels import VimWeights, causal_conv1d, selective_scan, use_backend, vim_rows
from omnissm.kernels.testing import relative_error

NAMES = ("x", "in_proj", "out_proj", *(f"{name}{end}" for end in ("", "_b") for name in VimWeights._fields))


def arguments(b, l, d, n=4, r=3, k=4):  # noqa: E741
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    shapes = (d, k), (d,), (r + 2 * n, d), (d, r), (d,), (d, n), (d,)
    sides = [scale * torch.randn(*shape, **draw) for _ in "fb" for shape, scale in zip(shapes, (0.4, 1, 1, 1, 2, 1, 1))]
    m = d // 2
    maps = [torch.randn(*shape, **draw) / shape[1] ** 0.5 for shape in ((2 * d, m), (m, d))]
    return [torch.randn(b, l, m, **draw), *maps, *sides]


def definition(x, in_proj, out_proj, *weights):
    x, z = (x @ in_proj.mT).chunk(2, dim=-1)
    outputs = []
    for line, part in ((x, weights[:7]), (x.flip(1), weights[7:])):
        own = VimWeights(*part)
        u, _ = causal_conv1d(line, own.conv, own.conv_bias, backend="reference")
        n = own.A_log.shape[1]
        low, B, C = F.linear(u, own.x_proj).split([own.dt_proj.shape[1], n, n], dim=-1)
        dt = F.softplus(F.linear(low, own.dt_proj, own.dt_bias))
        outputs.append(selective_scan(u, dt, -own.A_log.exp(), B, C, own.D, backend="reference")[0])
    return (outputs[0] + outputs[1].flip(1)) * F.silu(z) @ out_proj.mT


def call(*tensors, **options):
    return vim_rows(*tensors[:3], VimWeights(*tensors[3:10]), VimWeights(*tensors[10:]), **options)


# Together in a block, one position, blocks of three rows and of two, fewer positions in a tile without gradients.
@pytest.mark.parametrize("size", [(2, 70, 6), (1, 1, 4), (5, 33, 600), (1, 13, 2200)])
def test_equals_its_parts(size):
    wide = [one.requires_grad_() for one in arguments(*size)]
    narrow = [one.detach().float().requires_grad_() for one in wide]
    expected, y = definition(*wide), call(*narrow)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, wide, cotangent)
    found = torch.autograd.grad(y, narrow, cotangent.float())
    assert relative_error(y, expected) < 3e-6
    for name, one, two in zip(NAMES, found, wanted, strict=True):
        assert (one - two).norm() <= 2e-5 * two.norm(), name
    with torch.no_grad():
        assert torch.equal(call(*narrow), y)


@pytest.mark.parametrize("size", [(2, 70, 6), (5, 33, 600)])
def test_with_its_norm(size):
    norm = torch.linspace(-1, 2, size[2] // 2, dtype=torch.float64)
    wide = [one.requires_grad_() for one in [*arguments(*size), norm]]
    narrow = [one.detach().float().requires_grad_() for one in wide]
    expected = definition(F.rms_norm(wide[0], norm.shape, norm, 0.1), *wide[1:-1])
    y = call(*narrow[:-1], norm=narrow[-1], eps=0.1)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, wide, cotangent)
    found = torch.autograd.grad(y, narrow, cotangent.float())
    assert relative_error(y, expected) < 3e-6
    for name, one, two in zip((*NAMES, "norm"), found, wanted, strict=True):
        assert (one - two).norm() <= 2e-5 * two.norm(), name
    with torch.no_grad():
        assert torch.equal(call(*narrow[:-1], norm=narrow[-1], eps=0.1), y)
    with pytest.raises(ValueError, match="`norm` has shape"):
        call(*narrow[:-1], norm=narrow[-1][1:])
    assert call(*narrow[:-1], norm=narrow[-1].double()) is None


def test_without_a_gradient_of_the_output():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sum()

        @staticmethod
        def backward(ctx, dsum):
            return None

    inputs = [one.float().requires_grad_() for one in arguments(1, 20, 6)]
    Stop.apply(call(*inputs)).backward()
    assert all(one.grad is None for one in inputs)


def test_buffers_go_with_the_call():
    """Without waiting for the collector of cycles."""
    inputs = [one.float().requires_grad_() for one in arguments(1, 20, 6)]
    gc.collect()
    gc.disable()
    try:
        torch.autograd.grad(call(*inputs).sum(), inputs)
        assert not any(type(one).__qualname__ == "_Block" for one in gc.get_objects())
    finally:
        gc.enable()


def test_states_that_keep_nearly_everything():
    wide = arguments(1, 2500, 4)
    for side in (wide[3:10], wide[10:]):
        side[3].zero_()
        side[4].zero_()
        side[5].fill_(-14.0)  # steps and decays are all the same, 1 - 5.8e-7, which float32 rounds to 1 - 6.0e-7
    wide = [one.requires_grad_() for one in wide]
    narrow = [one.detach().float().requires_grad_() for one in wide]
    expected, y = definition(*wide), call(*narrow)
    assert relative_error(y, expected) < 6e-6
    cotangent = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, wide[:1], cotangent)
    (found,) = torch.autograd.grad(y, narrow[:1], cotangent.float())
    assert relative_error(found, wanted) < 6e-6


def test_wide_steps():
    wide = arguments(1, 9, 4)
    for bias in (wide[7], wide[14]):
        bias += 100.0  # e^100 is no float32
    expected, y = definition(*wide), call(*(one.float() for one in wide))
    assert relative_error(y, expected) < 3e-6


def test_a_nan_stays_in_its_row():
    """Also where the other row's steps are too long for their exponentials."""
    inputs = [one.float() for one in arguments(2, 9, 6)]
    inputs[0][1] *= 1000
    expected = call(*inputs)[1]
    assert expected.isfinite().all()
    inputs[0][0, 4] = torch.nan
    found = call(*inputs)
    assert found[0, 4].isnan().all()
    torch.testing.assert_close(found[1], expected)


def test_second_derivatives():
    wide = [one.requires_grad_() for one in arguments(1, 9, 4)]
    narrow = [one.detach().float().requires_grad_() for one in wide]

    def twice(function, tensors):
        first = torch.autograd.grad(function(*tensors).sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), tensors)

    for name, one, two in zip(NAMES, twice(call, narrow), twice(definition, wide), strict=True):
        assert (one - two).norm() < 1e-4 * two.norm(), name

    def normed(x, *others):
        *weights, norm = others
        return definition(F.rms_norm(x, norm.shape, norm, 0.1), *weights)

    wide.append(torch.linspace(1, 2, 2, dtype=torch.float64).requires_grad_())
    narrow.append(wide[-1].detach().float().requires_grad_())
    found = twice(lambda *tensors: call(*tensors[:-1], norm=tensors[-1], eps=0.1), narrow)
    for name, one, two in zip((*NAMES, "norm"), found, twice(normed, wide), strict=True):
        assert (one - two).norm() < 1e-4 * two.norm(), name


def test_what_is_kept_and_what_is_left_to_the_parts():
    inputs = [one.float().requires_grad_() for one in arguments(2, 64, 6)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        call(*inputs)
    given = {one.data_ptr() for one in inputs}
    beside = sum(one.numel() for one in kept if one.data_ptr() not in given)
    # The outputs' sum, steps of low rank with B and C, and every eighth state of both sides.
    assert beside == 2 * 64 * 6 + 2 * 64 * 2 * 11 + 64 // 8 * 2 * 2 * 6 * 4
    assert call(*(one.double() for one in inputs)) is None
    assert call(inputs[0][:, :0], *inputs[1:]) is None
    with use_backend("reference"):
        assert call(*inputs) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*inputs) is None
    assert torch.func.vmap(lambda x: torch.tensor(call(x, *inputs[1:]) is None))(inputs[0][None]).all()


@pytest.mark.parametrize("number", [0, 1, 2, 4, 9, 16])
def test_shapes_that_do_not_fit(number):
    inputs = [one.float() for one in arguments(2, 9, 4)]
    inputs[number] = inputs[number][..., :-1]
    with pytest.raises(ValueError, match="has shape"):
        call(*inputs)
