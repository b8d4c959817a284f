"""HiPPO matrices: states that keep coefficients of the past in an orthogonal basis, and their diagonal forms.

    x' = A x + B u

Gu, Dao, Ermon, Rudra & Ré (2020); Gu, Goel & Ré (2021), appendix C; Gu et al. (2022), "How to Train Your HiPPO".
"""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

import torch
from torch import Tensor

HIPPO = ("legs", "legt", "fourier", "lagt")


class NormalForm(NamedTuple):
    """A = V (diag(Lambda) - P P^*) V^* with unitary V; one eigenvalue of each conjugate pair is kept.

    `Lambda` (n / 2,) with falling positive imaginary parts, `P` (rank, n / 2), `B` (n / 2,), `V` (n, n / 2); complex.
    A real output is twice the real part of what the kept half gives.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def hippo(name: str, n: int) -> tuple[Tensor, Tensor]:
    """The matrices of a HiPPO operator.

    Args:
        name: "legs" (Legendre, scaled), "legt" (Legendre, translated), "fourier" or "lagt" (Laguerre, translated).
        n: Number of states; even for "fourier".

    Returns:
        A (n, n) and B (n,), float64.

    Raises:
        ValueError: if the name is unknown or n is out of range.
    """
    _check(name, n)
    k = torch.arange(n, dtype=torch.float64)
    if name == "legs":
        root = (2 * k + 1).sqrt()
        return -(torch.outer(root, root).tril(-1) + torch.diag(k + 1)), root
    if name == "legt":
        root = (2 * k + 1).sqrt()
        sign = torch.where(k[:, None] >= k, 1.0, (-1.0) ** (k[:, None] - k))
        return -torch.outer(root, root) * sign / 2, root / 2
    if name == "lagt":
        ones = torch.ones(n, n, dtype=torch.float64)
        return -(ones.tril(-1) + torch.eye(n, dtype=torch.float64) / 2), torch.ones(n, dtype=torch.float64)
    B = torch.zeros(n, dtype=torch.float64)
    B[0], B[2::2] = 1.0, math.sqrt(2)
    A = -torch.outer(B, B)
    pair = torch.arange(0, n, 2)
    A[pair, pair + 1] -= math.pi * pair.double() / 2
    A[pair + 1, pair] += math.pi * pair.double() / 2
    return A, B


def rank_correction(name: str, n: int) -> Tensor:
    """P (rank, n), float64, such that A + sum_r P_r P_r^T is normal: a multiple of 1 plus a skew-symmetric matrix.

    Args:
        name: As for `hippo`.
        n: Number of states.

    Raises:
        ValueError: if the name is unknown or n is out of range.

    Source: Gu, Goel & Ré (2021), theorem 1.
    """
    _check(name, n)
    k = torch.arange(n, dtype=torch.float64)
    if name == "legs":
        return (k + 0.5).sqrt()[None]
    if name == "legt":
        return torch.stack([(k + 0.5).sqrt() * (k % 2 == parity) for parity in (0, 1)])
    if name == "lagt":
        return torch.full((1, n), math.sqrt(0.5), dtype=torch.float64)
    return hippo(name, n)[1][None]


def normal_form(name: str, n: int) -> NormalForm:
    """Diagonal plus low rank form of a HiPPO matrix, one eigenvalue of each conjugate pair.

    The eigenvectors are those of the Hermitian matrix -i S with S the skew part, which is well conditioned; the
    eigenvectors of A itself have condition 8e10 at n = 16.

    Args:
        name: As for `hippo`.
        n: Number of states, even.

    Raises:
        ValueError: if the name is unknown or n is odd.

    Source: Gu, Goel & Ré (2021), section 3.2 and appendix C.3.
    """
    if n % 2:
        raise ValueError(f"conjugate pairs need an even n, got n={n}.")
    A, B = hippo(name, n)
    P = rank_correction(name, n)
    normal = A + P.mT @ P
    real = normal.diagonal().mean()
    skew = (normal - normal.mT) / 2
    frequency, V = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    frequency, V = frequency[n // 2 :].flip(0), _true_pairs(frequency, V)[:, n // 2 :].flip(1)
    to_basis = V.mH
    return NormalForm(
        torch.complex(real.expand(n // 2), frequency), (to_basis @ P.to(V.dtype).mT).mT, to_basis @ B.to(V.dtype), V
    )


def _true_pairs(frequency: Tensor, V: Tensor) -> Tensor:
    """Eigenvectors (n, n) of rising frequencies whose later half is orthogonal to its own conjugate.

    Those of different frequencies are anyway. Within frequency zero, as "fourier" has it twice, any basis is one of
    eigenvectors; of a real basis (u, w) the pair is (u - i w) / sqrt(2) and (u + i w) / sqrt(2).
    """
    (zero,) = torch.where(frequency.abs() < 1e-9 * frequency.abs().max().clamp(min=1))
    if not len(zero):
        return V
    projector = (V[:, zero] @ V[:, zero].mH).real
    basis = torch.linalg.eigh(projector).eigenvectors[:, -len(zero) :]
    u, w = (part.to(V.dtype) / math.sqrt(2) for part in basis.chunk(2, dim=1))
    V = V.clone()
    V[:, zero] = torch.cat([u - 1j * w, u + 1j * w], dim=1)
    return V


class PerturbedForm(NamedTuple):
    """A + E = V diag(Lambda) V^{-1} with small E: `Lambda` (n,), `B` = V^{-1} B (n,), `V` (n, n); complex."""

    Lambda: Tensor
    B: Tensor
    V: Tensor


def perturbed_form(name: str, n: int, epsilon: float = 0.1, *, seed: int = 0) -> PerturbedForm:
    """Diagonal form of a HiPPO matrix moved a little, all n eigenvalues of it; the output is the real part.

    The eigenvectors of A + E have a condition of about n^2 / epsilon, where those of A itself have 1e19 at n = 32.
    The transfer function comes as near to that of A as epsilon is small, which dropping the low rank part does not.

    Args:
        name: As for `hippo`.
        n: Number of states.
        epsilon: Spectral norm of E, a complex Gaussian matrix.
        seed: Of E.

    Raises:
        ValueError: if the name is unknown, n is out of range, epsilon is not positive, or an eigenvalue is not stable.

    Source: Yu, Nigmetov, Morozov, Mahoney & Erichson (2023), section 3.
    """
    if epsilon <= 0:
        raise ValueError(f"`epsilon` must be positive, got {epsilon}; normal_form() is what needs no perturbation.")
    A, B = hippo(name, n)
    E = torch.randn(n, n, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))
    Lambda, V = torch.linalg.eig(A + epsilon * E / torch.linalg.matrix_norm(E, 2))
    if (Lambda.real >= 0).any():
        raise ValueError(
            f"epsilon={epsilon} moves an eigenvalue of {name!r} to {Lambda.real.max():.3g}, expected below 0; "
            "take a smaller one."
        )
    return PerturbedForm(Lambda, torch.linalg.solve(V, B.to(V.dtype)), V)


def _check(name: str, n: int) -> None:
    if name not in HIPPO:
        close = difflib.get_close_matches(name, HIPPO, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"Unknown HiPPO matrix {name!r}. {hint}Known: {', '.join(HIPPO)}.")
    if n < 1 or (name == "fourier" and n % 2):
        raise ValueError(f"`n` must be at least 1, and even for 'fourier', got n={n}.")
