"""The companion mixer: its matrix, autoregressions that it represents exactly, and bounded states."""

import numpy as np
import pytest
import torch

from omnissm.kernels import causal_conv1d
from omnissm.ssmcore.mixers.companion import Companion, Shift, apply_powers, companion_matrix, unit_norm
from omnissm.ssmcore.testing import SEQUENCE_CHECKS, check_compile, check_export


@pytest.mark.parametrize(("mixer", "d_state"), [(Companion, 1), (Companion, 4), (Shift, 2), (Shift, 4)])
@pytest.mark.parametrize("check", [c for c in SEQUENCE_CHECKS if c not in (check_compile, check_export)])
def test_contract(check, mixer, d_state, device):
    torch.manual_seed(0)
    check(mixer(6, d_state=d_state, device=device, dtype=torch.float64))


def test_the_shift_is_a_short_convolution():
    torch.manual_seed(0)
    mixer, x = Shift(6, d_state=4, dtype=torch.float64), torch.randn(2, 9, 6, dtype=torch.float64)
    y = causal_conv1d(x, mixer.C.flip(-1), activation=None)[0] + mixer.D * x
    torch.testing.assert_close(mixer(x), mixer.out_proj(torch.nn.functional.gelu(y)))
    _, state = mixer.prefill(x)
    torch.testing.assert_close(state.ssm, x[:, -4:].flip(1).mT)
    assert {name for name, _ in mixer.named_parameters()} == {"C", "D", "out_proj.weight", "out_proj.bias"}
    assert set(mixer.state_dict()) == {"C", "D", "out_proj.weight", "out_proj.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [Companion, Shift])
@pytest.mark.parametrize("check", [check_compile, check_export])
def test_traced(check, mixer, device):
    torch.manual_seed(0)
    check(mixer(6, d_state=3, device=device, dtype=torch.float64))


def test_characteristic_polynomial_is_that_of_a():
    a = torch.randn(5, dtype=torch.float64)
    found = np.poly(companion_matrix(a).numpy())
    np.testing.assert_allclose(found, [1.0, *(-a.numpy()[::-1])], atol=1e-10)


def test_powers():
    A, v = torch.randn(3, 4, 4).double(), torch.randn(6, 3, 4).double()
    count = torch.tensor([0, 1, 2, 5, 13, 8])
    expected = [torch.linalg.matrix_power(A, int(k)) @ each[..., None] for k, each in zip(count, v)]
    torch.testing.assert_close(apply_powers(A, v, count), torch.stack(expected)[..., 0])


def test_an_autoregression_is_a_special_case():
    """With B the first unit vector of the controllable form, y_t = sum_k a_k y_{t-k} + u_t."""
    coefficients = torch.tensor([0.4, -0.3, 0.1, 0.2], dtype=torch.float64)  # of lags 1 to 4; 1-norm 1
    mixer = Companion(1, d_state=4, dtype=torch.float64)
    with torch.no_grad():
        mixer.a.copy_(coefficients.flip(0)[None])  # the last entry multiplies what left n steps ago
        mixer.B.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    n = 4
    impulse = torch.zeros(40, dtype=torch.float64)
    impulse[0] = 1
    y = []
    for t in range(40):
        y.append(impulse[t] + sum(coefficients[k] * y[t - 1 - k] for k in range(n) if t - 1 - k >= 0))
    # the last state's response to an impulse is the autoregression's, n - 1 steps later
    with torch.no_grad():
        mixer.C.copy_(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    found = mixer.kernel(40)[0, n - 1 :]
    torch.testing.assert_close(found, torch.stack(y)[: len(found)], rtol=0, atol=1e-10)


def test_states_stay_bounded():
    A = companion_matrix(unit_norm(torch.randn(20, 8, dtype=torch.float64)))
    v = unit_norm(torch.randn(1, 20, 8, dtype=torch.float64))
    assert apply_powers(A, v, torch.tensor([100_000])).abs().sum(-1).max() <= 1 + 1e-9


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="`d_state` must be at least 1, got 0"):
        Companion(4, d_state=0)
