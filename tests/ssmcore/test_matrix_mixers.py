"""Matrix mixers: which matrices they are, what they reduce to, and what they refuse."""

import math

import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers.common import Layout

DOUBLE = {"dtype": torch.float64}
SIZES = {"headdim": 8, "qk_dim": 3, "max_len": 16}


def matrix(name, length, **options):
    torch.manual_seed(0)
    mixer = create_mixer(name, 8, **SIZES | options, **DOUBLE)
    return mixer, mixer.mixing_matrix(torch.randn(2, length, 8, **DOUBLE)).matrix - torch.eye(length)


def test_low_rank_has_rank_of_its_features():
    _, found = matrix("low_rank", 12)
    assert torch.linalg.matrix_rank(found).max() == 3


@pytest.mark.parametrize("learned", [False, True])
def test_toeplitz_is_constant_on_diagonals(learned):
    _, found = matrix("toeplitz", 12, data_dependent=not learned)
    torch.testing.assert_close(found[..., 1:, 1:], found[..., :-1, :-1])
    assert found.shape[0] == (1 if learned else 2)


def test_softmax_rows_sum_to_one():
    mixer, found = matrix("softmax_mixer", 12)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 12, **DOUBLE))
    x, mask = torch.randn(1, 12, 8, **DOUBLE), torch.arange(12)[None] < 9
    torch.testing.assert_close(mixer(x, mask=mask)[:, :9], mixer(x[:, :9]))


def test_learned_vandermonde_is_the_fourier_transform():
    mixer, found = matrix("vandermonde", 16, data_dependent=False)
    assert "features" not in dict(mixer.named_parameters())
    expected = torch.fft.fft(torch.eye(16, **DOUBLE)).real / 4
    torch.testing.assert_close(found, expected.expand(1, 2, -1, -1))


def test_vandermonde_from_the_input():
    q, k = torch.randn(2, 1, 1, 5, 3, **DOUBLE).unbind()
    mixer = create_mixer("vandermonde", 4, **SIZES, **DOUBLE)
    found = mixer._matrix(q, k, Layout())[0, 0]
    turn = 2e-3 * math.pi
    for t in range(5):
        for s in range(5):
            entry = ((turn * q[0, 0, t] * s).cos() - (turn * k[0, 0, s] * t).cos()).sum() / math.sqrt(2 * 16 * 3)
            torch.testing.assert_close(found[t, s], entry)


def test_quasiseparable_is_hydra_with_shared_maps():
    torch.manual_seed(0)
    mixer = create_mixer("quasiseparable", 8, headdim=8, qk_dim=2, **DOUBLE)
    hydra = create_mixer("hydra", 8, headdim=8, d_state=4, **DOUBLE)
    weights = mixer.state_dict()
    z, x, maps, steps = weights["in_proj.weight"].split([16, 16, 8, 4])
    weights["in_proj.weight"] = torch.cat([z, x, maps, maps, steps])
    for name in ("conv1d.weight", "conv1d.bias"):
        weights[name] = torch.cat([weights[name], weights[name][16:]])
    hydra.load_state_dict(weights)
    x = torch.randn(2, 11, 8, **DOUBLE)
    torch.testing.assert_close(mixer(x), hydra(x))


@pytest.mark.parametrize(
    ("name", "learned", "extra"),
    [
        ("low_rank", False, 0),
        ("low_rank", True, 2 * 2 * 16 * 3),
        ("softmax_mixer", False, 0),
        ("cauchy", False, 2),
        ("vandermonde", True, 0),
        ("toeplitz", False, 0),
        ("toeplitz", True, 2 * 2 * 16),
        ("dense", True, 2 * 16 * 16),
    ],
)
def test_parameters(name, learned, extra):
    d, inner, heads = 8, 16, 2
    features = 0 if learned else 2 * heads * (1 if name == "toeplitz" else 3)
    expected = d * (2 * inner + features) + 8 * (inner + features) + inner + inner * d + extra
    mixer = create_mixer(name, d, **SIZES, data_dependent=not learned)
    assert sum(p.numel() for p in mixer.parameters()) == expected


def test_wrong_use():
    mixer = create_mixer("low_rank", 8, **SIZES)
    with pytest.raises(ValueError, match="`x` has 17 positions, expected at most max_len=16"):
        mixer(torch.zeros(1, 17, 8))
    with pytest.raises(ValueError, match="LowRankMixer takes no packed sequences"):
        mixer(torch.zeros(1, 4, 8), seq_idx=torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match="LowRankMixer sees both directions and has no state"):
        mixer.prefill(torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match="DenseMixer learns its matrix"):
        create_mixer("dense", 8, **SIZES, data_dependent=True)
    with pytest.raises(ValueError, match="`d_conv` must be odd"):
        create_mixer("cauchy", 8, **SIZES, d_conv=4)
    with pytest.raises(ValueError, match="`headdim` must divide the 16"):
        create_mixer("cauchy", 8, headdim=5)
