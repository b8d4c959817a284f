"""ParaGRU and ParaLSTM: Newton's method finds what the loop computes, and hands over where it cannot."""

import warnings

import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers import ParaGRU, ParaLSTM
from omnissm.ssmcore.mixers.block_scan import block_scan
from omnissm.ssmcore.mixers.common import lay_out

DOUBLE = {"dtype": torch.float64}
GOLDEN_LSTM = (3.7535454898, 0.2725165953, 0.1535128878, 0.0234859092)


CELLS = pytest.mark.parametrize("cell", [ParaGRU, ParaLSTM])


def problem(scale, bound, length=200, cell=ParaGRU):
    torch.manual_seed(0)
    mixer = cell(16, headdim=8, bound=bound, max_iters=8, **DOUBLE)
    with torch.no_grad():
        for weight in (mixer.A, mixer.C) if cell is ParaLSTM else (mixer.A,):
            weight.copy_(scale * weight.sign())
    w = torch.randn(2, length, 3, 16, **DOUBLE)
    reset = torch.zeros(2, length, dtype=torch.bool)
    reset[1, 50] = True
    start = 0.5 * torch.randn_like(mixer.init_state(2).ssm)
    return mixer, w, start, lay_out(w[:, :, 0], reset=reset)


@CELLS
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_newton_is_the_loop_with_its_gradient(cell, scale):
    mixer, w, start, layout = problem(scale, 1.5, cell=cell)
    results = []
    weights = torch.randn(2, 200, *start.shape[1:], **DOUBLE)
    for solve in (lambda w, s, layout: mixer._solve(w, s, layout)[0], mixer._loop):
        leaves = [w.clone().requires_grad_(), start.clone().requires_grad_(), mixer.A]
        leaves += [mixer.C] if cell is ParaLSTM else []
        h = solve(leaves[0], leaves[1], layout)
        results.append([h, *torch.autograd.grad((h * weights).sum(), leaves)])
    assert mixer.fallbacks == 0
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@CELLS
@pytest.mark.parametrize("length", [64, 300])
def test_stopping_early_changes_nothing(cell, length, monkeypatch):
    """Compiled code does all iterations; outputs and gradients are the same, also where the last one was needed."""
    torch.manual_seed(1)
    mixer = cell(16, headdim=8, bound=1.5, **DOUBLE)
    with torch.no_grad():
        mixer.A.copy_(mixer.A.sign())
    x, results = torch.randn(2, length, 16, **DOUBLE).requires_grad_(), []
    weights = torch.sin(torch.arange(x.numel(), **DOUBLE)).view_as(x)
    for compiling in (False, True):
        monkeypatch.setattr("torch.compiler.is_compiling", lambda compiling=compiling: compiling)
        y = mixer(x)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *mixer.parameters()])])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert mixer.fallbacks == 0


@CELLS
def test_divergence_is_warned_once_counted_and_solved_by_the_loop(cell):
    mixer, w, start, layout = problem(6.0, 8.0, cell=cell)
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


@CELLS
def test_weights_beyond_the_bound_come_back(cell):
    """The loss asks for outputs of smaller weights."""
    mixer, w, start, layout = problem(0.5, 1.0, cell=cell)
    wanted = mixer._loop(w, start, layout).detach()
    with torch.no_grad():
        mixer.A.mul_(2.2)
    optimizer = torch.optim.Adam([mixer.A], lr=0.05)
    for _ in range(20):
        loss = (mixer._solve(w, start, layout)[0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (mixer.A.abs() < 1).double().mean() > 0.5


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
    mixer, w, start, _ = problem(1.0, 1.5, cell=ParaLSTM)
    h = start.clone().requires_grad_()
    f, slope = mixer._cell(h, w[:, 0])
    for row in range(2):  # of the states after, c and h; units do not see each other
        (expected,) = torch.autograd.grad(f[:, row].sum(), h, retain_graph=True)
        torch.testing.assert_close(slope[:, row], expected)


def test_cell_of_the_lstm():
    """The equations written out, and numbers computed once from them."""
    mixer = ParaLSTM(16, headdim=8, **DOUBLE)
    place = torch.arange(6 * 3 * 16, **DOUBLE).reshape(1, 6, 3, 16)
    w = torch.sin(0.7 * place + 0.1)
    with torch.no_grad():
        mixer.A.copy_(0.5 * w[0, 0])
        mixer.C.copy_(0.5 * w[0, 1, :2])
    c = h = torch.zeros(1, 16, **DOUBLE)
    for t in range(6):
        f = torch.sigmoid(mixer.A[0] * h + mixer.C[0] * c + w[:, t, 0])
        c = f * c + (1 - f) * torch.tanh(mixer.A[2] * h + w[:, t, 2])
        h = torch.sigmoid(mixer.A[1] * h + mixer.C[1] * c + w[:, t, 1]) * torch.tanh(c)
    states, last = mixer._solve(w, torch.zeros(1, 2, 16, **DOUBLE), lay_out(w[:, :, 0]))
    torch.testing.assert_close(last, torch.stack([c, h], dim=1), rtol=1e-10, atol=1e-10)
    assert last.sum().item() == pytest.approx(GOLDEN_LSTM[0], abs=1e-8)
    assert mixer._output(states)[0, 2, :3].tolist() == pytest.approx(GOLDEN_LSTM[1:], abs=1e-8)


@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_scan_of_blocks(length):
    torch.manual_seed(0)
    a, b = 0.5 * torch.randn(2, length, 2, 2, 3, **DOUBLE), torch.randn(2, length, 2, 3, **DOUBLE)
    h, expected = torch.randn(2, 2, 3, **DOUBLE), []
    start = h
    for t in range(length):
        h = torch.einsum("bijn,bjn->bin", a[:, t], h) + b[:, t]
        expected.append(h)
    torch.testing.assert_close(block_scan(a, b, start), torch.stack(expected, dim=1))
    if length < 10:
        leaves = [t.clone().requires_grad_() for t in (a, b, start)]
        assert torch.autograd.gradcheck(block_scan, leaves)


def test_parameters_state_and_refusals():
    d, inner = 8, 16
    mixer = create_mixer("paragru", d, expand=2, headdim=4)
    expected = 2 * d * inner + 5 * inner + 3 * inner + 3 * inner * 4 + 3 * inner + inner + inner * d
    assert sum(p.numel() for p in mixer.parameters()) == expected
    assert mixer.state_numel() == 4 * inner
    lstm = create_mixer("paralstm", d, expand=2, headdim=4)
    assert sum(p.numel() for p in lstm.parameters()) == expected + 2 * inner
    assert lstm.state_numel() == 5 * inner
    with pytest.raises(NotImplementedError, match="ParaGRU is not linear"):
        mixer.mixing_matrix(torch.zeros(1, 3, d))
    with pytest.raises(ValueError, match="`bound` must be positive"):
        ParaGRU(d, bound=0)
    with pytest.raises(ValueError, match="`headdim` must divide"):
        ParaGRU(d, headdim=3)
