"""Long convolutions: kernels against written-out sums, gates, filters, block-diagonal maps."""

import math

import pytest
import torch
import torch.nn.functional as F

from omnissm.ssmcore import RMSNorm, create_mixer
from omnissm.ssmcore.blocks import Residual
from omnissm.ssmcore.mixers import BlockDiagLinear, HyenaFilter, LongConv, MonarchMixer, MonarchMLP

DOUBLE = {"dtype": torch.float64}
# Computed once with numpy from the equations.
GOLDEN_LONG = [-0.1518785407, -1.2395644258, 1.0396195991]
GOLDEN_FILTER = [0.3644932556, 0.9110870714, 0.7340878492]


def wave(*shape, seed):
    return torch.sin(0.7 * torch.arange(math.prod(shape), **DOUBLE) + 1.3 * seed + 0.1).reshape(shape)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [3, 8, 20])
def test_long_conv_is_a_sum_over_taps(bidirectional, length):
    mixer = LongConv(2, max_len=8, bidirectional=bidirectional, threshold=0.1, **DOUBLE)
    x = torch.randn(1, length, 2, **DOUBLE)
    taps = F.softshrink(mixer.kernel, 0.1)
    expected = mixer.D * x[0]
    for t in range(length):
        for s in range(length):
            if 0 <= t - s < 8:
                expected[t] = expected[t] + taps[0, :, t - s] * x[0, s]
            if bidirectional and 0 < s - t <= 8:
                expected[t] = expected[t] + taps[1, :, s - t - 1] * x[0, s]
    torch.testing.assert_close(mixer.mixing_matrix(x).outputs[0, ..., 0], expected)
    torch.testing.assert_close(mixer(x)[0], F.glu(mixer.out_proj(F.gelu(expected)), dim=-1))


def test_golden_numbers():
    mixer = LongConv(2, max_len=4, threshold=0.25, **DOUBLE)
    with torch.no_grad():
        mixer.kernel.copy_(wave(1, 2, 4, seed=1))
        mixer.D.copy_(wave(2, seed=2))
    y = mixer.mixing_matrix(wave(1, 6, 2, seed=3)).outputs
    assert [y.sum().item(), *y[0, -1, :, 0].tolist()] == pytest.approx(GOLDEN_LONG, abs=1e-8)
    filters = HyenaFilter(2, 5, order=3, **DOUBLE)
    with torch.no_grad():
        for number, tensor in enumerate(filters.parameters()):
            tensor.copy_(wave(*tensor.shape, seed=number))
    taps = filters()
    assert [taps.sum().item(), *taps[0, :2].tolist()] == pytest.approx(GOLDEN_FILTER, abs=1e-8)


def test_monarch_written_out():
    torch.manual_seed(0)
    mixer = MonarchMixer(3, max_len=6, order=4, **DOUBLE)
    x = torch.randn(1, 9, 3, **DOUBLE)
    qkv = F.pad(mixer.in_proj(x), (0, 0, 2, 0)).mT
    q, k, v = F.conv1d(qkv, mixer.conv1d.weight, mixer.conv1d.bias, groups=9).mT.chunk(3, dim=-1)

    def convolve(taps, D, u):
        return D * u + sum(taps[:, j] * F.pad(u, (0, 0, j, 0))[:, :9] for j in range(6))

    y = q * convolve(mixer.filters[0](), mixer.D, k * v) + convolve(mixer.residual[0](), mixer.residual_D, x)
    torch.testing.assert_close(mixer(x), mixer.out_proj(y))


def test_filters_fade():
    taps = HyenaFilter(4, 100, **DOUBLE)()
    assert taps.shape == (4, 100)
    size = taps.abs().unflatten(1, (4, 25)).amax(-1)
    assert (size[:, 3] < size[:, 0]).all()
    assert (size[3] / size[3, 0])[3] < (size[0] / size[0, 0])[3]  # the last channel fades fastest


def test_block_diagonal_maps():
    torch.manual_seed(0)
    layer, x = BlockDiagLinear(8, 12, nblocks=4, **DOUBLE), torch.randn(2, 5, 8, **DOUBLE)
    torch.testing.assert_close(layer(x), F.linear(x, layer.matrix(), layer.bias))
    assert sum(p.numel() for p in layer.parameters()) == 8 * 12 // 4 + 12
    block = Residual(8, LongConv(8, max_len=5), MonarchMLP(8, nblocks=2))
    block.mlp_norm = RMSNorm(8)
    block(x.float()).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    with pytest.raises(ValueError, match="`nblocks` must divide 8 inputs and 12 outputs, got 3"):
        BlockDiagLinear(8, 12, nblocks=3)


def test_parameters_states_and_refusals():
    d, taps, order = 6, 10, 8
    assert sum(p.numel() for p in LongConv(d, max_len=taps).parameters()) == d * taps + d + 2 * d * d + 2 * d
    filters = (5 + 1) * order + 2 * (order + 1) * order + order + order * d + d
    mixer = MonarchMixer(d, max_len=taps, order=order)
    expected = 3 * d * (d + 1) + 4 * 3 * d + 2 * (filters + d) + d * (d + 1)
    assert sum(p.numel() for p in mixer.parameters()) == expected
    assert mixer.state_numel() == 2 * d * (taps - 1) + 3 * d * 2
    with pytest.raises(TypeError, match="MonarchMixer sees both directions"):
        MonarchMixer(d, max_len=taps, bidirectional=True).prefill(torch.zeros(1, 3, d))
    with pytest.raises(ValueError, match="`max_len` must be at least 1"):
        create_mixer("long_conv", d, max_len=0)
    with pytest.raises(ValueError, match="`features` must be odd"):
        create_mixer("monarch", d, features=4)
