"""ParaGRU: Newton's method finds what the loop computes, with its gradient, and hands over where it cannot."""

import warnings

import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers import ParaGRU
from omnissm.ssmcore.mixers.common import lay_out

DOUBLE = {"dtype": torch.float64}


def problem(scale, bound, length=200):
    torch.manual_seed(0)
    mixer = ParaGRU(16, headdim=8, bound=bound, max_iters=8, **DOUBLE)
    with torch.no_grad():
        mixer.A.copy_(scale * mixer.A.sign())
    w = torch.randn(2, length, 3, 16, **DOUBLE)
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[1, 50] = True
    return mixer, w, 0.5 * torch.randn(2, 16, **DOUBLE), lay_out(w[:, :, 0], reset=reset)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_newton_is_the_loop_with_its_gradient(scale):
    mixer, w, start, layout = problem(scale, 1.5)
    results = []
    weights = torch.randn(2, 200, 16, **DOUBLE)
    for solve in (lambda w, s, layout: mixer._solve(w, s, layout)[0], mixer._loop):
        leaves = [w.clone().requires_grad_(), start.clone().requires_grad_(), mixer.A]
        h = solve(leaves[0], leaves[1], layout)
        results.append([h, *torch.autograd.grad((h * weights).sum(), leaves)])
    assert mixer.fallbacks == 0
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_divergence_is_warned_once_counted_and_solved_by_the_loop():
    mixer, w, start, layout = problem(6.0, 8.0)
    with pytest.warns(UserWarning, match="Newton's method did not converge in 8 iterations with bound=8"):
        got, last = mixer._solve(w, start, layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixer._solve(w, start, layout)
    assert mixer.fallbacks == 2
    expected = mixer._loop(w, start, layout)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last, expected[:, -1], rtol=1e-6, atol=1e-6)


def test_weights_beyond_the_bound_are_clipped():
    mixer, w, start, _ = problem(3.0, 1.0)
    clipped, _ = mixer._cell(start, w[:, 0])
    with torch.no_grad():
        mixer.A.clamp_(-1, 1)
    torch.testing.assert_close(mixer._cell(start, w[:, 0])[0], clipped)


def test_without_recurrent_weights_it_is_a_linear_scan():
    mixer, w, start, layout = problem(0.0, 1.0)
    z, n = w[:, :, 0].sigmoid(), w[:, :, 2].tanh()
    h, expected = start, []
    for t in range(200):
        h = h * (torch.tensor([[1.0], [0.0]]) if t == 50 else 1.0)
        h = (1 - z[:, t]) * h + z[:, t] * n[:, t]
        expected.append(h)
    torch.testing.assert_close(mixer._solve(w, start, layout)[0], torch.stack(expected, dim=1))


def test_derivative_of_the_cell():
    mixer, w, start, _ = problem(1.0, 1.5)
    h = start.clone().requires_grad_()
    f, slope = mixer._cell(h, w[:, 0])
    torch.testing.assert_close(slope, torch.autograd.grad(f.sum(), h)[0])


def test_parameters_state_and_refusals():
    d, inner = 8, 16
    mixer = create_mixer("paragru", d, expand=2, headdim=4)
    expected = 2 * d * inner + 5 * inner + 3 * inner + 3 * inner * 4 + 3 * inner + inner + inner * d
    assert sum(p.numel() for p in mixer.parameters()) == expected
    assert mixer.state_numel() == 4 * inner
    with pytest.raises(NotImplementedError, match="ParaGRU is not linear"):
        mixer.mixing_matrix(torch.zeros(1, 3, d))
    with pytest.raises(ValueError, match="`bound` must be positive"):
        ParaGRU(d, bound=0)
    with pytest.raises(ValueError, match="`headdim` must divide"):
        ParaGRU(d, headdim=3)
