"""S4D: printed kernels, the recurrence it stands for, and what time invariance brings."""

import math

import pytest
import torch

from omnissm.ssmcore.mixers.s4 import S4D, S4DInit, discretize

DOUBLE = {"dtype": torch.float64}
INITS = S4DInit.__args__


def small(**options):
    torch.manual_seed(0)
    return S4D(6, **{"d_state": 8, "n_ssm": 2, **DOUBLE, **options})


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("zoh", [0.298581919, 0.288875652, 0.269786668, 0.243187992, 0.211532614]),
        ("bilinear", [0.297748272, 0.288285884, 0.269619232, 0.243529479, 0.212371288]),
    ],
)
def test_golden_kernel(rule, expected):
    mixer = S4D(1, d_state=4, discretization=rule, **DOUBLE)
    with torch.no_grad():
        mixer.inv_dt.fill_(math.log(0.1))
        mixer.A_imag.copy_(torch.tensor([[0, math.pi]]))
        mixer.C.copy_(torch.tensor([[1, 0], [0.5, -0.25]]))
    kernel, ahead = mixer._kernels(5)
    assert ahead is None
    assert kernel[0].tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", INITS)
def test_convolution_is_the_recurrence(init, rule):
    mixer = small(init=init, discretization=rule)
    x = torch.randn(2, 37, 6, **DOUBLE)
    state, outputs = mixer.init_state(2), []
    for position in x.unbind(1):
        y, state = mixer.step(position, state)
        outputs.append(y)
    whole, last = mixer.prefill(x)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.ssm, last.ssm, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mixer(x), whole, rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1000])
def test_long_kernels_stay_exact_in_float32(length):
    torch.manual_seed(0)
    mixer = S4D(2, d_state=64)
    kernel, _ = mixer._kernels(length)
    A = torch.complex(-mixer.A_real.double().exp(), mixer.A_imag.double())
    log_A, B = discretize(mixer.inv_dt.double().exp(), A, torch.ones_like(A))
    powers = (log_A[..., None] * torch.arange(length)).exp()
    C = torch.view_as_complex(mixer.C[0].double())
    expected = 2 * ((C * B)[..., None] * powers).real.sum(1)
    torch.testing.assert_close(kernel.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_padding_packing_and_resets():
    mixer = small()
    x = torch.randn(3, 9, 6, **DOUBLE)
    state = mixer.prefill(torch.randn(3, 4, 6, **DOUBLE))[1]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0], [1] * 9, [0] * 9]).bool()
    y, last = mixer.prefill(x, state, mask=mask)
    alone, end = mixer.prefill(x[:1, 2:6], state.select(torch.tensor([0])))
    torch.testing.assert_close(y[:1, 2:6], alone)
    torch.testing.assert_close(last.ssm[:1], end.ssm)
    torch.testing.assert_close(last.ssm[2], state.ssm[2])  # a row of padding keeps its state
    assert not y[~mask].any()

    reset = torch.zeros(3, 9, dtype=torch.bool)
    reset[:, 5] = True
    y, last = mixer.prefill(x, state, reset=reset)
    packed, same = mixer.prefill(x, state, seq_idx=reset.cumsum(1).int())
    before, _ = mixer.prefill(x[:, :5], state)
    after, end = mixer.prefill(x[:, 5:])
    for got, got_state in ((y, last), (packed, same)):
        torch.testing.assert_close(got, torch.cat([before, after], 1))
        torch.testing.assert_close(got_state.ssm, end.ssm)


def test_two_sided_kernels():
    mixer = small(bidirectional=True)
    x = torch.randn(2, 7, 6, **DOUBLE)
    behind, ahead = mixer._kernels(7)
    found = mixer.mixing_matrix(x)
    assert found.matrix.shape == (1, 6, 7, 7)
    torch.testing.assert_close(found.apply(), found.outputs)
    assert found.matrix[0, 3, 5, 2].item() == pytest.approx(behind[3, 3].item())
    assert found.matrix[0, 3, 2, 3].item() == pytest.approx(ahead[3, 0].item())  # the nearest later one
    with pytest.raises(TypeError, match="S4D sees both directions and has no state"):
        mixer.prefill(x)
    cut = small(bidirectional=True, length=2)
    found = cut.mixing_matrix(x)
    torch.testing.assert_close(found.apply(), found.outputs)
    assert not found.matrix.triu(3).any()
    assert not found.matrix.tril(-2).any()


def test_rate_adapts_to_the_sampling():
    """Twice as many samples of a smooth signal and half the steps give the same output."""
    torch.manual_seed(0)
    coarse = S4D(4, d_state=16, dt_min=1e-2, dt_max=2e-2, **DOUBLE)
    fine = S4D(4, d_state=16, rate=0.5, dt_min=1e-2, dt_max=2e-2, **DOUBLE)
    fine.load_state_dict(coarse.state_dict())
    time = torch.arange(0, 200, dtype=torch.float64) / 2
    signal = torch.stack([torch.sin(0.02 * (k + 1) * time) for k in range(4)], -1)[None]
    expected, got = coarse(signal[:, ::2]), fine(signal)[:, ::2]
    assert (got - expected).norm() / expected.norm() < 1e-2


def test_parameters_and_groups():
    mixer = S4D(8, d_state=16)
    # inv_dt, A_real and A_imag, B, C, D; output map with bias
    assert sum(p.numel() for p in mixer.parameters()) == 8 + 2 * 64 + 128 + 128 + 8 + 8 * 16 + 16
    assert set(mixer.lr_names()) <= {name for name, _ in mixer.named_parameters()}
    assert S4D(8, d_state=16, n_ssm=2).A_real.shape == (2, 8)
    assert mixer.state_numel() == mixer.init_state(1).ssm.numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 5}, "even and at least 2"),
        ({"n_ssm": 4}, "`n_ssm` must divide d_model=6, got 4"),
        ({"init": "line"}, "`init` must be one of 'lin', 'inv'"),
        ({"discretization": "euler"}, "must be 'zoh' or 'bilinear'"),
        ({"length": 8}, "needs bidirectional=True"),
        ({"rate": 0}, "`rate` must be positive"),
        ({"dt_min": 0.5}, "0 < dt_min <= dt_max"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        S4D(6, **options)
