"""SeqBoat: dense attention when all tokens are active, an average when none is, and a loop over positions else."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers import SeqBoat
from omnissm.ssmcore.mixers.common import Layout

DOUBLE = {"dtype": torch.float64}
GOLDEN = [1.648277011845, 0.745906757254, 0.328579409666]


def build(push=0.0, **options):
    """A mixer whose gate is pushed to the second option."""
    torch.manual_seed(0)
    mixer = SeqBoat(6, **{"n_ema": 2, "qk_dim": 3, "d_hidden": 8, "window": 4} | options, **DOUBLE)
    with torch.no_grad():
        for layer in (mixer.hx_proj, mixer.mx_proj, mixer.h_proj):
            layer.weight.mul_(20)
        mixer.qk_scale.normal_()
        mixer.distance_bias.normal_()
        mixer.hx_proj.bias[1] = push
    return mixer


def loop(mixer, x):
    """One sequence (l, d), position after position and pair after pair."""
    sides = 1 if mixer.causal else 2
    p, a = mixer.delta.sigmoid(), mixer.alpha.sigmoid()
    average = mixer.omega * x
    for t in range(len(x)):
        for s in range(len(x)):
            side = 0 if s <= t else 1
            if side < sides:
                q = (1 - p[side] * a[side]) ** abs(t - s)
                average[t] += (mixer.gamma[side] * p[side] * mixer.beta[side] * q).sum(-1) / mixer.n_ema**0.5 * x[s]
    m = F.silu(average)
    u, hx = mixer.hx_proj(m).split([2, 6], dim=-1)
    share = (u / mixer.log_temperature.exp()).softmax(-1)
    active = [t for t in range(len(x)) if share[t, 1] > share[t, 0]]
    z, r, v = F.silu(mixer.mx_proj(m)).split([3, 8, 8], dim=-1)
    q, k = (z * mixer.qk_scale[i] + mixer.qk_bias[i] for i in range(2))
    y = hx.clone()
    for i, t in enumerate(active):
        near = [(i - j, s) for j, s in enumerate(active) if abs(i - j) <= mixer.window and (j <= i or not mixer.causal)]
        offset = 0 if mixer.causal else mixer.window
        pairs = torch.stack([q[t] @ k[s] for _, s in near])
        bias = torch.stack([mixer.distance_bias[d + offset] for d, _ in near])
        if mixer.activation == "softmax":
            weights = (pairs / 3**0.5 + bias).softmax(0)
        else:
            weights = (pairs / (mixer.window * sides) + bias).relu() ** 2
        found = sum(w * v[s] for w, (_, s) in zip(weights, near))
        y[t] = hx[t] + share[t, 1] * mixer.h_proj(r[t] * found)
    return y, active


@pytest.mark.parametrize("activation", ["relu2", "softmax"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_is_a_loop_over_positions(activation, bidirectional):
    mixer = build(activation=activation, bidirectional=bidirectional)
    x = torch.randn(2, 25, 6, **DOUBLE)
    with torch.no_grad():  # half of all tokens are to be active
        u = mixer.hx_proj(F.silu(mixer._average(x, None, Layout())[0]))
        mixer.hx_proj.bias[0] = (u[..., 1] - u[..., 0]).median() + 1e-9  # no token on the border
    for row in range(2):
        expected, active = loop(mixer, x[row])
        assert 6 < len(active) < 20  # more than a window, and not all
        torch.testing.assert_close(mixer(x)[row], expected)
        assert mixer.active(x)[row].nonzero().flatten().tolist() == active


def test_none_active_is_the_average_alone():
    mixer, x = build(push=-1e6), torch.randn(1, 12, 6, **DOUBLE)
    assert not mixer.active(x).any()
    average, _ = mixer._average(x, None, Layout())
    torch.testing.assert_close(mixer(x), mixer.hx_proj(F.silu(average))[..., 2:])


def test_all_active_within_the_window_is_dense_attention():
    mixer, x = build(push=1e6, window=12, activation="softmax"), torch.randn(1, 12, 6, **DOUBLE)
    with torch.no_grad():
        mixer.distance_bias.zero_()
    assert mixer.active(x).all()
    m = F.silu(mixer._average(x, None, Layout())[0])
    z, r, v = F.silu(mixer.mx_proj(m)).split([3, 8, 8], dim=-1)
    q, k = (z * mixer.qk_scale[i] + mixer.qk_bias[i] for i in range(2))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(mixer(x), mixer.hx_proj(m)[..., 2:] + mixer.h_proj(r * y))


def test_golden_numbers():
    mixer = build()
    with torch.no_grad():
        for number, tensor in enumerate(mixer.parameters()):
            wave = torch.sin(0.7 * torch.arange(tensor.numel(), **DOUBLE) + 1.3 * number + 0.1)
            tensor.copy_(wave.reshape(tensor.shape))
    x = torch.sin(0.7 * torch.arange(60, **DOUBLE) + 1.4).reshape(1, 10, 6)
    y = mixer(x)
    torch.testing.assert_close(y[0], loop(mixer, x[0])[0])
    assert 0 < mixer.active(x).sum() < 10
    assert [y.sum().item(), *y[0, -1, :2].tolist()] == pytest.approx(GOLDEN, abs=1e-8)


def test_parameters_state_and_refusals():
    d, n, z, h, w = 6, 2, 3, 8, 4
    mixer = build()
    expected = 4 * d * n + d + (d + 1) * (d + 2) + (d + 1) * (z + 2 * h) + 4 * z + w + 1 + 1 + (h + 1) * d
    assert sum(p.numel() for p in mixer.parameters()) == expected
    assert mixer.state_numel() == d * n + w * (z + h)
    with pytest.raises(TypeError, match="SeqBoat sees both directions"):
        build(bidirectional=True).prefill(torch.zeros(1, 3, d, **DOUBLE))
    with pytest.raises(NotImplementedError, match="SeqBoat is not linear"):
        mixer.mixing_matrix(torch.zeros(1, 3, d, **DOUBLE))
    with pytest.raises(ValueError, match="`window` must be at least 1, got 0"):
        create_mixer("seqboat", d, window=0)
    with pytest.raises(ValueError, match="must be 'relu2' or 'softmax'"):
        create_mixer("seqboat", d, activation="relu")
