"""S5: the recurrence it stands for, resets inside the scan, its initialisation and what it refuses."""

import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.hippo import hippo
from omnissm.ssmcore.mixers import S4D, S5

DOUBLE = {"dtype": torch.float64}


def test_one_channel_is_s4d():
    torch.manual_seed(0)
    one, many = S4D(1, d_state=8, **DOUBLE), S5(1, d_state=8, **DOUBLE)
    with torch.no_grad():
        many.Lambda_re.copy_(-one.A_real[0].exp())
        many.Lambda_im.copy_(one.A_imag[0])
        many.log_step.copy_(one.inv_dt[0].expand(4))
        many.B.copy_(one.B[0, 0, :, None])
        many.C.copy_(one.C[0, None])
        many.D.copy_(one.D)
    x = torch.randn(2, 30, 1, **DOUBLE)
    torch.testing.assert_close(many.mixing_matrix(x).outputs[..., 0], one.mixing_matrix(x).outputs)


def test_resets_are_episodes():
    torch.manual_seed(0)
    mixer = S5(4, d_state=8, **DOUBLE)
    x = torch.randn(1, 40, 4, **DOUBLE)
    reset = torch.rand(1, 40) < 0.2
    y, state = mixer.prefill(x, reset=reset)
    h = mixer.init_state(1)
    for t in range(40):
        one, h = mixer.step(x[:, t], mixer.init_state(1) if reset[0, t] else h)
        torch.testing.assert_close(y[:, t], one)
    torch.testing.assert_close(state.ssm, h.ssm)


def test_two_sided_matrix():
    torch.manual_seed(0)
    mixer = S5(3, d_state=4, bidirectional=True, **DOUBLE)
    x = torch.randn(1, 6, 3, **DOUBLE)
    found = mixer.mixing_matrix(x)
    torch.testing.assert_close(found.apply(), found.outputs)
    assert found.matrix[0, 0, 0, :, 5].abs().max() > 1e-4  # the first position sees the last
    with pytest.raises(TypeError, match="S5 sees both directions and has no state"):
        mixer.prefill(x)


def test_initial_eigenvalues_are_those_of_blocks():
    mixer = S5(4, d_state=16, blocks=2)
    normal = hippo("legs", 8)[0]
    normal = normal + torch.outer(*2 * [(torch.arange(8, dtype=torch.float64) + 0.5).sqrt()])
    frequencies = torch.linalg.eigvals(normal).imag
    expected = frequencies[frequencies > 0].sort(descending=True).values.repeat(2)
    torch.testing.assert_close(mixer.Lambda_im.detach().double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(mixer.Lambda_re.detach(), torch.full((8,), -0.5))


def test_half_the_rate_for_twice_the_samples():
    torch.manual_seed(0)
    coarse, fine = (S5(4, d_state=8, rate=rate, dt_max=0.02, **DOUBLE) for rate in (1.0, 0.5))
    fine.load_state_dict(coarse.state_dict())
    time = torch.arange(200, dtype=torch.float64)[:, None]
    signal = torch.sin(0.01 * time * torch.arange(1, 5))[None]
    got, expected = fine(signal)[:, ::2], coarse(signal[:, ::2])
    assert (got - expected).norm() / expected.norm() < 1e-2


def test_parameters():
    d, n = 8, 16
    mixer = S5(d, d_state=n)
    expected = 3 * n // 2 + 2 * (n * d) + d + d * d + d  # Lambda and steps; B and C; D; gate
    assert sum(p.numel() for p in mixer.parameters()) == expected
    assert mixer.state_numel() == n


def test_unstable_eigenvalues_are_refused_or_clipped():
    free, clipped = S5(4, d_state=8, clip_eigs=False), S5(4, d_state=8)
    weights = free.state_dict()
    weights["Lambda_re"][2] = 0.25
    with pytest.raises(ValueError, match=r"1 unstable eigenvalues \(real part >= 0\), the first at 2: 0.25"):
        free.load_state_dict(weights)
    clipped.load_state_dict(weights)
    assert clipped(torch.ones(1, 3000, 4)).abs().max() < 1e4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 6, "blocks": 2}, "multiple of 2 \\* blocks=4"),
        ({"C_init": "lecunn"}, "`C_init` must be 'lecun' or 'complex_normal', got 'lecunn'"),
        ({"discretization": "euler"}, "must be 'zoh' or 'bilinear'"),
        ({"rate": 0}, "`rate` must be positive"),
        ({"dt_min": 0.5}, "0 < dt_min <= dt_max"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("s5", 4, **options)
