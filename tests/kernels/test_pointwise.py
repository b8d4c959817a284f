"""`swiglu` and `rotate_heads` against their formulas, on every path."""

import math

import pytest
import torch
import torch.nn.functional as F

from omnissm.kernels import rms_norm, rotate_heads, ssd_rates, swiglu, use_backend

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 5, 14), (1, 3, 2200)])
def test_swiglu_is_its_formula(shape, dtype, backend, device):
    wide = torch.randn(*shape[:-1], shape[-1] + 3, dtype=dtype, device=device)
    x = wide[..., : shape[-1]]  # rows lie apart
    value, gate = x.double().chunk(2, dim=-1)
    expected = value * gate / (1 + torch.exp(-gate))
    with torch.no_grad(), use_backend(backend):
        y = swiglu(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    grown = x.detach().requires_grad_()
    torch.testing.assert_close(swiglu(grown), F.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0])
    assert torch.autograd.grad(swiglu(grown).sum(), grown)[0].shape == x.shape


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("heads", "width", "half", "rows"), [(3, 8, 2, 1), (2, 6, 3, 2), (5, 12, 3, 2)])
def test_pairs_are_turned_by_their_angle(heads, width, half, rows, interleaved, dtype, backend, device):
    wide = torch.randn(2, 4, heads + 1, width, dtype=dtype, device=device)
    x = wide[:, :, :heads]  # as the queries and keys in one projection
    angle = torch.linspace(-3, 9, rows * 4 * half, dtype=torch.float64, device=device).view(rows, 4, half)
    wider = torch.promote_types(dtype, torch.float32)
    with torch.no_grad(), use_backend(backend):
        y = rotate_heads(x, angle.cos().to(wider), angle.sin().to(wider), interleaved=interleaved)
    assert y.dtype == dtype
    expected = x.double().clone()
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = torch.complex(x[..., first].double(), x[..., second].double()) * torch.exp(1j * angle[..., i, None])
        expected[..., first], expected[..., second] = turned.real, turned.imag
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(y[..., 2 * half :], x[..., 2 * half :])


def test_a_rotation_keeps_lengths_and_turns_gradients_back(device):
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, device=device, requires_grad=True)
    angle = torch.full((1, 3, 3), math.pi / 3, dtype=torch.float64, device=device)
    y = rotate_heads(x, angle.cos(), angle.sin())
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(back, x.detach())


def test_single_rows(backend, device):
    """One vector, as for one position of one sequence."""
    x, weight, A_log = torch.randn(3, 6, device=device)
    with torch.no_grad(), use_backend(backend):
        torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (6,), weight, 1e-5))
        dt, log_decay = ssd_rates(x, weight, A_log)
    torch.testing.assert_close(dt, F.softplus(x + weight))
    torch.testing.assert_close(log_decay, -F.softplus(x + weight) * A_log.exp())


def test_refusals(device):
    x, angle = torch.randn(1, 2, 3, 4, device=device), torch.zeros(1, 2, 3, device=device)
    with pytest.raises(ValueError, match="heads of 4 channels have no 3 pairs"):
        rotate_heads(x, angle, angle)
    with pytest.raises(ValueError, match="two halves, got a last dimension of 3"):
        swiglu(torch.zeros(2, 3, device=device))
    with pytest.raises(ValueError, match="`x` must have at least 1 dimensions"):
        swiglu(torch.zeros((), device=device))
    with pytest.raises(TypeError, match="`x`"):
        swiglu(torch.zeros(2, 4, dtype=torch.int64, device=device))
