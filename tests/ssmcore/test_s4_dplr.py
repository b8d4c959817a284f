"""S4: its kernel is the recurrence and the dense matrices, and what perturbing before diagonalising costs."""

import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.hippo import hippo, normal_form, perturbed_form
from omnissm.ssmcore.mixers import S4

DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize("init", ["legs", "legt", "ptd"])
def test_kernel_is_the_step(init):
    torch.manual_seed(0)
    mixer = S4(2, d_state=8, init=init, **DOUBLE)
    for length in (1, 2, 7, 64, 1000):
        impulse = torch.zeros(1, length, 2, **DOUBLE)
        impulse[:, 0] = 1
        kernel, _ = mixer._kernels(length)
        state, outputs = mixer.init_state(1), []
        mixer._out = lambda y: y  # before activation and output map
        for t in range(length):
            y, state = mixer.step(impulse[:, t], state)
            outputs.append(y[0] - mixer.D * impulse[0, t])
        del mixer._out
        torch.testing.assert_close(kernel, torch.stack(outputs, dim=1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("init", ["legs", "legt"])
def test_kernel_is_the_dense_matrix(init):
    """In the basis of the HiPPO matrix: (1 - dt/2 A)^{-1} (1 + dt/2 A) to powers of lengths beyond one block."""
    torch.manual_seed(0)
    n, length = 8, 200
    mixer = S4(1, d_state=n, init=init, **DOUBLE)
    A, B = hippo(init, n)
    V = normal_form(init, n).V
    eye, dt = torch.eye(n, **DOUBLE), mixer.inv_dt.exp().item()
    step = torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
    h, C = torch.linalg.solve(eye - dt / 2 * A, dt * B), torch.randn(n, **DOUBLE)
    expected = []
    for _ in range(length):
        expected.append(C @ h)
        h = step @ h
    with torch.no_grad():
        mixer.C.copy_(torch.view_as_real(C.to(V.dtype) @ V))
    # "legt" has an undamped normal part, which is kept at a real part of -1e-4.
    tolerance = 1e-7 if init == "legs" else 2e-2
    torch.testing.assert_close(mixer._kernels(length)[0][0], torch.stack(expected), rtol=tolerance, atol=tolerance)


def test_perturbed_legs_is_near_the_matrix_and_well_conditioned():
    n = 64
    A, B = (part.to(torch.complex128) for part in hippo("legs", n))
    form = perturbed_form("legs", n)
    assert torch.linalg.cond(form.V) < 1e5
    assert form.Lambda.real.max() < -0.6
    C = torch.randn(n, generator=torch.Generator().manual_seed(1), **DOUBLE).to(torch.complex128)
    s = 1j * torch.logspace(-2, 4, 300, **DOUBLE)[:, None]
    exact = torch.linalg.solve(s[..., None] * torch.eye(n) - A, B) @ C
    near = ((C @ form.V) * form.B / (s - form.Lambda)).sum(-1)
    assert (near - exact).abs().max() / exact.abs().max() < 0.03
    plain = normal_form("legs", n)  # dropping the low rank part, as S4D does, stays far away
    pairs = torch.cat([plain.Lambda, plain.Lambda.conj()]), torch.cat([plain.B, plain.B.conj()])
    V = torch.cat([plain.V, plain.V.conj()], dim=1)
    far = ((C @ V) * pairs[1] / 2 / (s - pairs[0])).sum(-1)
    assert (far - exact).abs().max() / exact.abs().max() > 0.3


def test_any_length_needs_no_other_parameters():
    torch.manual_seed(0)
    mixer = S4(2, d_state=8, **DOUBLE)
    before = {name: value.clone() for name, value in mixer.state_dict().items()}
    torch.testing.assert_close(mixer._kernels(50)[0], mixer._kernels(173)[0][:, :50])
    assert all(torch.equal(value, before[name]) for name, value in mixer.state_dict().items())


def test_parameters():
    d, n = 6, 16
    shared = n + n + n  # A (real and imaginary), B and P as pairs of numbers
    rest = d + d * n + d + d * 2 * d + 2 * d  # steps, C, D, output map
    assert sum(p.numel() for p in S4(d, d_state=n).parameters()) == shared + rest
    ptd = S4(d, d_state=n, init="ptd")
    assert sum(p.numel() for p in ptd.parameters()) == 4 * n + d + 2 * d * n + d + d * 2 * d + 2 * d
    assert "P" in S4(d, d_state=n).lr_names()
    assert "P" not in ptd.lr_names()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 5}, "even and at least 2"),
        ({"init": "lin"}, "`init` must be one of 'legs'"),
        ({"epsilon": -1, "init": "ptd"}, "`epsilon` must be positive"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("s4", 4, **options)
