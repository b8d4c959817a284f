"""Mamba and LBMamba: the equations position by position, special cases, options."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.ssmcore.mixers import LBMamba, Mamba
from omnissm.ssmcore.testing import sequence_input


def small(cls=Mamba, **options):
    torch.manual_seed(0)
    return cls(8, **{"d_state": 3, "dtype": torch.float64, **options})


def by_the_book(m, u, window=1):
    """The equations with a loop over positions, for one row; a second one inside segments of `window`."""
    x, z = F.linear(u, m.in_proj.weight, m.in_proj.bias).chunk(2, dim=-1)
    K = m.conv1d.kernel_size[0]
    padded, taps = F.pad(x, (0, 0, K - 1, 0)), m.conv1d.weight[:, 0].T
    bias = 0 if m.conv1d.bias is None else m.conv1d.bias
    x = F.silu(torch.stack([bias + (taps * padded[t : t + K]).sum(0) for t in range(len(u))]))
    dt, B, C = F.linear(x, m.x_proj.weight).split([m.dt_rank, m.d_state, m.d_state], dim=-1)
    if m.use_bcdt_rms:
        dt, B, C = (t / (t.square().mean(-1, keepdim=True) + m.bcdt_eps).sqrt() for t in (dt, B, C))
    dt = F.softplus(F.linear(dt, m.dt_proj.weight, m.dt_proj.bias))
    A = -m.A_log.exp()
    decay, inputs = torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, None]
    states, h = [], torch.zeros_like(A)
    for t in range(len(u)):
        h = decay[t] * h + inputs[t]
        states.append(h)
    for start in range(0, len(u), window):
        h = torch.zeros_like(A)
        for t in reversed(range(start, min(start + window, len(u)))):
            h = decay[t] * h + inputs[t]
            states[t] = states[t] + h - inputs[t]
    y = (torch.stack(states) * C[:, None]).sum(-1) + m.D * x
    return F.linear(y * F.silu(z), m.out_proj.weight, m.out_proj.bias)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Mamba, {}),
        (Mamba, {"dt_rank": 2, "d_conv": 2, "use_bcdt_rms": True, "bcdt_eps": 1e-3, "bias": True}),
        (Mamba, {"dt_init": "constant", "dt_scale": 2.0, "conv_bias": False, "expand": 1}),
        (LBMamba, {"window": 1}),
        (LBMamba, {"window": 3}),
        (LBMamba, {"window": 9, "dt_rank": 2, "bias": True}),
    ],
    ids=str,
)
def test_equations(cls, options):
    mixer = small(cls, **options)
    torch.nn.init.normal_(mixer.D)
    x = sequence_input(mixer, 8)
    expected = torch.stack([by_the_book(mixer, row, options.get("window", 1)) for row in x])
    torch.testing.assert_close(mixer(x), expected, atol=1e-10, rtol=1e-10)


def test_parameters_are_those_of_the_published_module():
    assert sum(p.numel() for p in Mamba(768).parameters()) == 3_770_880
    shapes = {name: tuple(p.shape) for name, p in small().named_parameters()}
    assert shapes == {
        "in_proj.weight": (32, 8),
        "conv1d.weight": (16, 1, 4),
        "conv1d.bias": (16,),
        "x_proj.weight": (7, 16),
        "dt_proj.weight": (16, 1),
        "dt_proj.bias": (16,),
        "A_log": (16, 3),
        "D": (16,),
        "out_proj.weight": (8, 16),
    }
    assert small(LBMamba).state_dict().keys() == small().state_dict().keys()


def test_initial_values():
    mixer = Mamba(256, dt_min=0.01, dt_max=0.2)
    dt = F.softplus(mixer.dt_proj.bias)
    assert 0.01 <= dt.min() < 0.011
    assert 0.18 < dt.max() <= 0.2001
    torch.testing.assert_close(mixer.A_log.exp()[5], torch.arange(1.0, 17.0))
    assert 0.2 < mixer.dt_proj.weight.abs().max() <= 0.25  # 16^-1/2
    assert (Mamba(256, dt_init="constant", dt_scale=0.5).dt_proj.weight == 0.125).all()
    narrow = Mamba(16, dtype=torch.bfloat16)
    assert {narrow.A_log.dtype, narrow.D.dtype, narrow.dt_proj.bias.dtype} == {torch.float32}


def test_one_position_per_segment_is_mamba():
    mixer, plain = small(LBMamba, window=1), small()
    x = sequence_input(mixer)
    torch.testing.assert_close(mixer(x), plain(x))


def test_one_segment_is_both_directions_with_the_diagonal_once():
    mixer, plain = small(LBMamba, window=64), small()
    x = sequence_input(mixer)
    both, one = mixer.mixing_matrix(x), plain.mixing_matrix(x)
    torch.testing.assert_close(both.matrix.tril(), one.matrix)
    assert both.matrix.triu(1)[:, 0, 0, -1].all()


def test_segments_start_with_the_real_tokens():
    mixer = small(LBMamba, window=3)
    x = sequence_input(mixer, 7)
    mask = F.pad(torch.ones(2, 7, dtype=torch.bool), (2, 4))
    torch.testing.assert_close(mixer(F.pad(x, (0, 0, 2, 4), value=5.0), mask=mask)[:, 2:9], mixer(x))


@pytest.mark.parametrize(("cls", "options"), [(Mamba, {"bias": True}), (LBMamba, {"window": 4})], ids=str)
def test_effective_matrix_gives_the_input_of_out_proj(cls, options):
    mixer = small(cls, expand=1, **options)
    with torch.no_grad():
        mixer.out_proj.weight.copy_(torch.eye(8))
        if mixer.out_proj.bias is not None:
            mixer.out_proj.bias.zero_()
    x = sequence_input(mixer)
    found = mixer.mixing_matrix(x, effective=True, channels=[5, 1])
    torch.testing.assert_close(found.apply(), found.outputs)
    torch.testing.assert_close(found.outputs[..., 0], mixer(x)[..., [5, 1]])
    torch.testing.assert_close(found.inputs[..., 0], mixer.in_proj(x)[..., [5, 1]])
    whole = mixer.mixing_matrix(x, effective=True)
    torch.testing.assert_close(found.matrix, whole.matrix[:, [5, 1]])


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Mamba, {"dt_rank": 0}, "`dt_rank` must be at least 1, got 0"),
        (Mamba, {"dt_init": "zeros"}, "`dt_init` must be 'random' or 'constant'"),
        (Mamba, {"dt_min": 0.2}, "Steps need 0 < dt_min <= dt_max"),
        (LBMamba, {"window": 0}, "`window` must be at least 1, got 0"),
    ],
)
def test_options_are_checked(cls, options, message):
    with pytest.raises(ValueError, match=message):
        small(cls, **options)
