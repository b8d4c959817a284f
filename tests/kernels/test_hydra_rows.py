"""`hydra_rows`: against its parts and the definition in float64, and what it leaves to the parts."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.kernels import causal_conv1d, gated_norm, hydra_rows, quasiseparable, use_backend
from omnissm.kernels.testing import relative_error

NAMES = ("projected", "conv", "conv_bias", "dt_bias", "A_log", "from_x", "D", "gate")
EPS = 1e-5


def arguments(b, l, h, p, n, g, k, rate=0.5, size=1.0):  # noqa: E741
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    inner, mixed = h * p, h * p + 4 * g * n
    shapes = (mixed, 1, k), (mixed,), (h,), (h,), (h, inner), (h,), (inner,)
    scales = 0.4, 0.1, 1, rate, 0.1, 1, 1
    weights = [scale * torch.randn(*shape, **draw) for scale, shape in zip(scales, shapes, strict=True)]
    weights[2] -= 2
    return [size * torch.randn(b, l, inner + mixed + 2 * h, **draw), *weights]


def definition(n, projected, conv, conv_bias, dt_bias, A_log, from_x, D, gate):
    (heads, inner), mixed = from_x.shape, conv.shape[0]
    z, mix, dt_f, dt_b = projected.split([inner, mixed, heads, heads], dim=-1)
    mix, _ = causal_conv1d(mix, conv[:, 0], conv_bias, symmetric=True, backend="reference")
    x, *maps = mix.split([inner, *4 * [(mixed - inner) // 4]], dim=-1)
    B_f, C_f, B_b, C_b = (one.unflatten(-1, (-1, n)) for one in maps)
    dt_f, dt_b = F.softplus(dt_f + dt_bias), F.softplus(dt_b + dt_bias)
    rate, diag = -A_log.exp(), F.linear(x, from_x, D)
    sides = dt_f * rate, dt_f, B_f, C_f, dt_b * rate, dt_b, B_b, C_b
    y, _ = quasiseparable(x.unflatten(-1, (heads, -1)), *sides, diag, backend="reference")
    return gated_norm(y.flatten(2), z, gate, eps=EPS, norm_before_gate=True, backend="reference")


def gradients(function, inputs, cotangent):
    inputs = [one.detach().requires_grad_() for one in inputs]
    y = function(*inputs)
    found = torch.autograd.grad(y, inputs, cotangent.to(y.dtype), allow_unused=True)
    return y, [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, found, strict=True)]


@pytest.mark.parametrize(
    "size",
    [
        {"b": 2, "l": 50, "h": 4, "p": 8, "n": 16, "g": 2, "k": 7},
        {"b": 1, "l": 1, "h": 2, "p": 4, "n": 4, "g": 1, "k": 3},
        {"b": 3, "l": 2, "h": 2, "p": 4, "n": 4, "g": 2, "k": 1},
        {"b": 2, "l": 61, "h": 3, "p": 8, "n": 8, "g": 1, "k": 5, "rate": 3.0},
        {"b": 1, "l": 57, "h": 2, "p": 8, "n": 8, "g": 1, "k": 7, "size": 8.0},  # steps from 1e-10 to 20
    ],
)
def test_equals_its_parts(size):
    inputs, n = arguments(**size), size["n"]
    cotangent = torch.randn(size["b"], size["l"], size["h"] * size["p"], dtype=torch.float64)
    expected, wanted = gradients(lambda *one: definition(n, *one), inputs, cotangent)
    narrow = [one.float() for one in inputs]
    y, found = gradients(lambda *one: hydra_rows(*one, d_state=n, eps=EPS), narrow, cotangent)
    assert relative_error(y, expected) < 3e-6
    for name, one, two in zip(NAMES, found, wanted, strict=True):
        assert (one - two).norm() <= 2e-5 * two.norm(), name
    with torch.no_grad():
        assert relative_error(hydra_rows(*narrow, d_state=n, eps=EPS), expected) < 3e-6


def test_strong_decays_cost_weak_ones_no_digits():
    """Steps of 1e4 before and after short ones: their sums must not meet in one number."""
    inputs = arguments(1, 60, 2, 8, 8, 1, 3, rate=0.0)
    inputs[0][:, 20:30, -4:] = 1e4
    inputs[0][:, 30:, -4:] = -4.0
    cotangent = torch.randn(1, 60, 16, dtype=torch.float64)
    expected, wanted = gradients(lambda *one: definition(8, *one), inputs, cotangent)
    y, found = gradients(lambda *one: hydra_rows(*one, d_state=8, eps=EPS), [one.float() for one in inputs], cotangent)
    assert relative_error(y[:, 31:], expected[:, 31:]) < 1e-5
    steps, exact = found[0][:, 31:, -4:], wanted[0][:, 31:, -4:]
    assert (steps - exact).norm() < 1e-4 * exact.norm()


def test_second_derivatives():
    inputs = [one.float().requires_grad_() for one in arguments(2, 9, 2, 4, 4, 1, 3)]
    wide = [one.detach().double().requires_grad_() for one in inputs]

    def twice(function, tensors):
        first = torch.autograd.grad(function(*tensors).sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), tensors)

    found = twice(lambda *one: hydra_rows(*one, d_state=4, eps=EPS), inputs)
    expected = twice(lambda *one: definition(4, *one), wide)
    for name, one, two in zip(NAMES, found, expected, strict=True):
        assert (one - two).norm() < 1e-4 * two.norm(), name


def test_what_is_kept_and_what_is_left_to_the_parts():
    inputs = [one.float() for one in arguments(2, 9, 2, 4, 4, 1, 3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        kept = []
        hydra_rows(*(one.requires_grad_() for one in inputs), d_state=4, eps=EPS)
    assert set(kept) == {one.data_ptr() for one in inputs}
    options = {"d_state": 4, "eps": EPS}
    assert hydra_rows(*(one.double() for one in inputs), **options) is None
    assert hydra_rows(inputs[0].repeat(1, 40, 1), *inputs[1:], **options) is None
    assert hydra_rows(inputs[0][:, :0], *inputs[1:], **options) is None
    with use_backend("reference"):
        assert hydra_rows(*inputs, **options) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert hydra_rows(*inputs, **options) is None
    assert torch.func.vmap(lambda x: torch.tensor(hydra_rows(x, *inputs[1:], **options) is None))(inputs[0][None]).all()


@pytest.mark.parametrize(
    ("number", "message"), [(0, "`projected` has shape"), (1, "do not make up"), (3, "`dt_bias` has shape")]
)
def test_shapes_that_do_not_fit(number, message):
    inputs = [one.float() for one in arguments(2, 9, 2, 4, 4, 1, 3)]
    inputs[number] = inputs[number][..., :-1]
    with pytest.raises(ValueError, match=message):
        hydra_rows(*inputs, d_state=4, eps=EPS)
