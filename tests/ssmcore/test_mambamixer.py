"""MambaMixer: what it is with one layer, its weighted skips, causality and the limit of its length."""

import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers import Bidirectional, Mamba, MambaMixer
from omnissm.ssmcore.mixers.mambamixer import ChannelMixer

DOUBLE = {"dtype": torch.float64}


def build(**options):
    torch.manual_seed(0)
    return MambaMixer(6, **{"d_state": 3, "max_len": 12} | options, **DOUBLE)


def test_a_new_layer_is_mamba_along_both_axes():
    mixer, x = build(), torch.randn(2, 12, 6, **DOUBLE)
    along, across = (
        Mamba(6, d_state=3, **DOUBLE),
        Bidirectional(12, mixer="mamba", mixer_options={"d_state": 3}, **DOUBLE),
    )
    along.load_state_dict(mixer.tokens[0].state_dict())
    across.load_state_dict(mixer.channels[0].scan.state_dict())
    torch.testing.assert_close(mixer(x), across(along(x).mT).mT)


def test_shorter_inputs_are_filled_with_zeros():
    mixer, x = build(n_layer=2), torch.randn(2, 7, 6, **DOUBLE)
    mixing = ChannelMixer(6, max_len=12, d_state=3, **DOUBLE)
    whole = torch.cat([x, torch.zeros(2, 5, 6, **DOUBLE)], dim=1)
    torch.testing.assert_close(mixing(x), mixing(whole)[:, :7])
    mask = torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(mixer(x), mixer(x, mask=mask))
    with pytest.raises(ValueError, match="`x` has 13 positions, expected at most max_len=12"):
        mixer(torch.zeros(1, 13, 6, **DOUBLE))


def test_skips_weigh_all_earlier_outputs():
    """The sums of the paper with every term, written out for two layers."""
    mixer, x = build(n_layer=2), torch.randn(1, 9, 6, **DOUBLE)
    with torch.no_grad():
        for weights in (*mixer.to_token, *mixer.to_channel):
            weights.normal_()
    (a1, b1), (th10, th11, g10) = mixer.to_token[0], mixer.to_channel[0]
    (a20, a21, b20, b21), (th20, th21, th22, g20, g21) = mixer.to_token[1], mixer.to_channel[1]
    token1 = mixer.tokens[0](a1 * x + b1 * x)
    channel1 = mixer.channels[0](th10 * x + th11 * token1 + g10 * x)
    token2 = mixer.tokens[1](a20 * x + a21 * token1 + b20 * x + b21 * channel1)
    channel2 = mixer.channels[1](th20 * x + th21 * token1 + th22 * token2 + g20 * x + g21 * channel1)
    torch.testing.assert_close(mixer(x), channel2)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_from_the_future(causal):
    mixer, x = build(causal=causal, n_layer=2), torch.randn(1, 10, 6, **DOUBLE, requires_grad=True)
    (dx,) = torch.autograd.grad(mixer(x)[:, 4].sum(), x)
    assert dx[:, :5].abs().amax((0, 2)).min() > 0
    assert dx[:, 5:].any() != causal
    (dx,) = torch.autograd.grad(mixer.tokens[0](x)[:, 4].sum(), x)  # the token mixer never looks ahead
    assert not dx[:, 5:].any()


def test_channels_see_each_other_in_both_directions():
    for limit in (None, 5):
        mixing = ChannelMixer(6, max_len=limit, d_state=3, d_conv=2, **DOUBLE)
        x = torch.randn(1, 5, 6, **DOUBLE, requires_grad=True)
        (dx,) = torch.autograd.grad(mixing(x)[0, 2, 3], x)
        assert dx[0, 2].abs().min() > 0
        assert bool(dx[0, [0, 1, 3, 4]].any()) == (limit is not None)


def test_golden_numbers():
    mixer = build(causal=True, channel_width=2)
    with torch.no_grad():
        for number, tensor in enumerate(mixer.parameters()):
            wave = torch.sin(0.7 * torch.arange(tensor.numel(), **DOUBLE) + 1.3 * number + 0.1)
            tensor.copy_(0.5 * wave.reshape(tensor.shape))
    y = mixer(torch.sin(0.7 * torch.arange(30, **DOUBLE) + 1.4).reshape(1, 5, 6))
    assert [y.sum().item(), *y[0, -1, :2].tolist()] == pytest.approx(
        [0.149012597360, 0.004218926834, 0.005085289470], abs=1e-8
    )


def test_parameters_state_and_refusals():
    d, inner, n = 6, 12, 3
    mamba = sum(p.numel() for p in Mamba(d, d_state=n).parameters())
    across = 2 * sum(p.numel() for p in Mamba(12, d_state=n).parameters())
    assert sum(p.numel() for p in build(n_layer=2).parameters()) == 2 * (mamba + across) + 2 + 3 + 4 + 5
    apart = 2 * sum(p.numel() for p in Mamba(4, d_state=n).parameters()) + 8 + 5
    mixer = build(causal=True)
    assert sum(p.numel() for p in mixer.parameters()) == mamba + apart + 2 + 3
    assert mixer.state_numel() == inner * (n + 3)
    with pytest.raises(TypeError, match="MambaMixer sees both directions"):
        build().prefill(torch.zeros(1, 3, d, **DOUBLE))
    with pytest.raises(NotImplementedError, match="token_jacobian"):
        mixer.mixing_matrix(torch.zeros(1, 3, d, **DOUBLE))
    with pytest.raises(ValueError, match="takes no packed sequences"):
        mixer(torch.zeros(1, 3, d, **DOUBLE), seq_idx=torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="`n_layer` must be at least 1, got 0"):
        create_mixer("mambamixer", d, n_layer=0)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        create_mixer("mambamixer", d, max_len=0)
