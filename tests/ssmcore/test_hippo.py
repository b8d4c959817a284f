"""HiPPO matrices against printed values, and what they are defined by."""

import math

import pytest
import torch

from omnissm.ssmcore.hippo import HIPPO, hippo, normal_form, rank_correction


def test_golden_matrices():
    legs, B = hippo("legs", 4)
    expected = [
        [-1, 0, 0, 0],
        [-1.732051, -2, 0, 0],
        [-2.236068, -3.872983, -3, 0],
        [-2.645751, -4.582576, -5.916080, -4],
    ]
    torch.testing.assert_close(legs, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(B, torch.tensor([1, 3, 5, 7], dtype=torch.float64).sqrt())
    fourier, _ = hippo("fourier", 4)
    rows = [[-1, 0, -1.414214, 0], [0, 0, 0, 0], [-1.414214, 0, -2, -3.141593], [0, 0, 3.141593, 0]]
    torch.testing.assert_close(fourier, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", HIPPO)
def test_the_correction_makes_them_normal(name):
    A, _ = hippo(name, 8)
    P = rank_correction(name, 8)
    normal = A + P.mT @ P
    torch.testing.assert_close(normal @ normal.mT, normal.mT @ normal, rtol=1e-12, atol=1e-12)
    skew = normal - normal.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(skew, -skew.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("name", HIPPO)
def test_normal_form_gives_the_matrix_back(name, n):
    A, B = hippo(name, n)
    form = normal_form(name, n)
    half = form.V @ torch.diag(form.Lambda) @ form.V.mH
    P = form.V @ form.P.mT  # (n, rank) of one half
    torch.testing.assert_close(2 * half.real - (2 * P.real) @ (2 * P.real).mT, A, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(2 * (form.V @ form.B).real, B, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HIPPO)
def test_conjugate_pairs_are_true_pairs(name):
    """Kept eigenvectors and their conjugates together are a unitary basis; "fourier" has frequency zero twice."""
    form = normal_form(name, 8)
    basis = torch.cat([form.V, form.V.conj()], dim=1)
    torch.testing.assert_close(basis.mH @ basis, torch.eye(8, dtype=basis.dtype), rtol=0, atol=1e-12)
    A, _ = hippo(name, 8)
    P = rank_correction(name, 8)
    normal = (A + P.mT @ P).to(basis.dtype)
    torch.testing.assert_close(normal @ form.V, form.V * form.Lambda, rtol=0, atol=1e-10)
    if name == "fourier":
        expected = torch.pi * torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
        torch.testing.assert_close(form.Lambda.imag, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("n", "frequencies"),
    [(4, [4.6033, 0.5565]), (8, [19.8574, 5.3542, 1.9578, 0.4275]), (64, [1303.27, 433.03, 258.15, 182.62])],
)
def test_frequencies_of_legs(n, frequencies):
    Lambda = normal_form("legs", n).Lambda
    torch.testing.assert_close(Lambda.real, torch.full_like(Lambda.real, -0.5))
    expected = torch.tensor(frequencies, dtype=torch.float64)
    torch.testing.assert_close(Lambda.imag[: len(frequencies)], expected, rtol=1e-4, atol=5e-5)


def test_golden_kernel_of_dense_legs():
    A, B = hippo("legs", 4)
    C = torch.sin(0.7 * torch.arange(4, dtype=torch.float64) + 1.3 + 0.1)
    left = torch.eye(4, dtype=torch.float64) - 0.05 * A
    Abar = torch.linalg.solve(left, torch.eye(4, dtype=torch.float64) + 0.05 * A)
    state, kernel = torch.linalg.solve(left, 0.1 * B), []
    for _ in range(6):
        kernel.append(float(C @ state))
        state = Abar @ state
    expected = [0.227090347, 0.207507879, 0.170434752, 0.130051811, 0.093219282, 0.062672525]
    assert kernel == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("steps", "limit"), [(1000, 1e-4), (10000, 1e-6)])
def test_legs_keeps_legendre_coefficients(steps, limit):
    """The recurrence over the whole past, bilinear with step 1 / (t - 1/2), on degree 5: second order."""
    A, B = hippo("legs", 6)
    samples = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    f = 1 - 2 * samples + samples**2 + 3 * samples**3 - samples**5
    state = torch.zeros(6, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    t = samples[:, None, None] * steps
    inverse = torch.linalg.inv(eye - A / (2 * t))
    for left, right, gain in zip(inverse, eye + A / (2 * t), f[:, None] * B / t[:, :, 0]):
        state = left @ (right @ state + gain)
    x, weight = _gauss(12)
    target = 1 - 2 * x + x**2 + 3 * x**3 - x**5
    legendre = [torch.ones_like(x), 2 * x - 1]
    for k in range(1, 5):
        legendre.append(((2 * k + 1) * (2 * x - 1) * legendre[k] - k * legendre[k - 1]) / (k + 1))
    expected = torch.stack([math.sqrt(2 * k + 1) * (weight * target * p).sum() for k, p in enumerate(legendre)])
    assert (state - expected).norm() / expected.norm() < limit


def _gauss(n):
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1] from the Jacobi matrix."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    x, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (x + 1) / 2, vectors[0] ** 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo("lexs", 4), "Unknown HiPPO matrix 'lexs'. Did you mean 'legs'?"),
        (lambda: hippo("fourier", 3), "even for 'fourier', got n=3"),
        (lambda: normal_form("legs", 5), "need an even n, got n=5"),
    ],
)
def test_wrong_requests(call, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        call()
