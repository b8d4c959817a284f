"""Mamba2 and DiscreteMamba2: the equations position by position, special cases, options, precision."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.kernels import causal_conv1d, selective_scan, ssd
from omnissm.kernels.testing import relative_error
from omnissm.ssmcore.mixers import DiscreteMamba2, Mamba2
from omnissm.ssmcore.testing import sequence_input


def small(**options):
    torch.manual_seed(0)
    return Mamba2(8, **{"d_state": 4, "headdim": 4, "dtype": torch.float64, **options})


def by_the_book(m, u):
    """The equations with loops over positions, heads and states, for one row."""
    G, N, P = m.ngroups, m.d_state, m.headdim
    outside = m.d_inner - m.d_ssm
    parts = F.linear(u, m.in_proj.weight, m.in_proj.bias).split(
        [outside, outside, m.d_ssm, m.d_ssm, G * N, G * N, m.nheads], dim=-1
    )
    z0, x0, z, x, B, C, raw = parts
    signal = torch.cat([x, B, C], dim=-1)
    K = m.conv1d.kernel_size[0]
    taps = m.conv1d.weight[:, 0]
    rows = []
    for t in range(len(u)):
        row = torch.zeros_like(signal[0]) if m.conv1d.bias is None else m.conv1d.bias
        for i in range(K):
            if t - K + 1 + i >= 0:
                row = row + taps[:, i] * signal[t - K + 1 + i]
        rows.append(F.silu(row))
    x, B, C = torch.stack(rows).split([m.d_ssm, G * N, G * N], dim=-1)
    dt = F.softplus(raw + m.dt_bias).clamp(*m.dt_limit)
    H = [m.init_states[h] if hasattr(m, "init_states") else torch.zeros(P, N).double() for h in range(m.nheads)]
    y = torch.zeros_like(x)
    for t in range(len(u)):
        for h in range(m.nheads):
            g = h // (m.nheads // G)
            channels, states = slice(h * P, (h + 1) * P), slice(g * N, (g + 1) * N)
            H[h] = torch.exp(-dt[t, h] * m.A_log[h].exp()) * H[h] + dt[t, h] * torch.outer(x[t, channels], B[t, states])
            D = m.D[channels] if m.D.shape[0] == m.d_ssm else m.D[h]
            y[t, channels] = H[h] @ C[t, states] + D * x[t, channels]

    def normed(y):
        return F.rms_norm(y.unflatten(-1, (G, -1)), (m.d_ssm // G,), eps=m.norm.eps).flatten(1) * m.norm.weight

    if m.norm is None:
        y = y * F.silu(z)
    elif m.norm.norm_before_gate:
        y = normed(y) * F.silu(z)
    else:
        y = normed(y * F.silu(z))
    return F.linear(torch.cat([F.silu(z0) * x0, y], dim=-1), m.out_proj.weight, m.out_proj.bias)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ngroups": 2, "D_has_hdim": True, "dt_limit": (0.01, 0.05), "norm_eps": 1e-2},
        {"ngroups": 4, "norm_before_gate": True, "bias": True, "learnable_init_states": True, "d_conv": 3},
        {"d_ssm": 8, "ngroups": 2, "rmsnorm": False, "conv_bias": False, "expand": 1.5},
    ],
    ids=str,
)
def test_equations(options):
    mixer = small(**options)
    if options.get("learnable_init_states"):
        torch.nn.init.normal_(mixer.init_states)
    torch.nn.init.normal_(mixer.D)
    x = sequence_input(mixer, 9)
    expected = torch.stack([by_the_book(mixer, row) for row in x])
    torch.testing.assert_close(mixer(x), expected, atol=1e-10, rtol=1e-10)


def test_multipliers():
    plain = small()
    scaled = small(mup_vector=(0.5, 2.0, 1.5, 0.7, 1.2), in_multiplier=0.3, out_multiplier=4.0)
    sizes = [16, 16, 4, 4, 4]
    factors = torch.cat([torch.full((n,), f).double() for n, f in zip(sizes, (0.5, 2.0, 1.5, 0.7, 1.2))])
    with torch.no_grad():
        for name, value in scaled.state_dict().items():
            plain.state_dict()[name].copy_(value)
        plain.in_proj.weight.mul_(0.3 * factors[:, None])
        plain.out_proj.weight.mul_(4.0)
    x = sequence_input(plain)
    torch.testing.assert_close(scaled(x), plain(x))


def test_parameters_are_those_of_the_published_module():
    assert sum(p.numel() for p in Mamba2(768).parameters()) == 3_764_552
    shapes = {name: tuple(p.shape) for name, p in small(ngroups=2, learnable_init_states=True).named_parameters()}
    assert shapes == {
        "in_proj.weight": (16 + 16 + 16 + 4, 8),
        "conv1d.weight": (32, 1, 4),
        "conv1d.bias": (32,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (16,),
        "init_states": (4, 4, 4),
        "out_proj.weight": (8, 16),
    }


def test_initial_values():
    mixer = Mamba2(64, headdim=1, dt_min=0.01, dt_max=0.2, A_init_range=(2, 3), conv_init=0.01)
    dt = F.softplus(mixer.dt_bias)
    assert 0.01 <= dt.min() < 0.02
    assert 0.15 < dt.max() <= 0.2001
    rate = mixer.A_log.exp()
    assert 2 <= rate.min() < 2.2 < 2.8 < rate.max() <= 3
    assert mixer.conv1d.weight.abs().max() <= 0.01
    assert (mixer.D == 1).all()
    recurrence = [Mamba2(64, dtype=torch.bfloat16).get_parameter(name) for name in ("A_log", "dt_bias", "D")]
    assert {p.dtype for p in recurrence} == {torch.float32}
    assert all(p._no_weight_decay and p._no_reinit for p in recurrence)


def test_a_slow_decay_is_a_running_sum():
    x = torch.randn(1, 50, 3, 2, dtype=torch.float64)
    ones = torch.ones(1, 50, 3, 1, dtype=torch.float64)
    y, _ = ssd(x, torch.full((1, 50, 3), -1e-14, dtype=torch.float64), ones, ones)
    torch.testing.assert_close(y, x.cumsum(1))


def test_heads_of_one_channel_are_a_selective_scan():
    x, dt = torch.randn(2, 30, 3, dtype=torch.float64), torch.rand(2, 30, 1, dtype=torch.float64).expand(-1, -1, 3)
    B, C = torch.randn(2, 2, 30, 4, dtype=torch.float64)
    A = -torch.rand(3, dtype=torch.float64)
    expected, h = selective_scan(x, dt.contiguous(), A[:, None].expand(-1, 4), B, C)
    y, H = ssd(x[..., None], dt * A, B[:, :, None], C[:, :, None], weight=dt)
    torch.testing.assert_close(y[..., 0], expected)
    torch.testing.assert_close(H[:, :, 0], h)


def test_discrete_form_is_mamba2_with_inputs_divided_by_the_step():
    torch.manual_seed(0)
    mixer = DiscreteMamba2(8, d_state=3, nheads=2, dtype=torch.float64)
    u = sequence_input(mixer)
    found = mixer.mixing_matrix(u)
    _, _, a = mixer.in_proj(u).split(mixer.splits, dim=-1)
    dt = F.softplus(a)
    xBC = F.conv1d(F.pad(mixer.in_proj(u)[..., :20].mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=20).mT
    x, B, C = (t.unflatten(-1, (2, -1)) for t in xBC.split([8, 6, 6], dim=-1))
    y, _ = ssd(x / dt[..., None], -dt, B, C, weight=dt)
    y = y + mixer.D[:, None] * x
    torch.testing.assert_close(found.outputs, y)
    torch.testing.assert_close(mixer(u), mixer.out_proj(y.flatten(2) * F.silu(mixer.in_proj(u)[..., 20:28])))


def test_discrete_form_takes_over_linear_attention():
    torch.manual_seed(0)
    mixer = DiscreteMamba2(8, d_state=4, nheads=2, dtype=torch.float64)
    mixer.attention_init_()
    with torch.no_grad():
        mixer.in_proj.weight[-2:] = 0  # with this bias there is no decay
        mixer.in_proj.bias = torch.nn.Parameter(torch.zeros(mixer.in_proj.out_features, dtype=torch.float64))
        mixer.in_proj.bias[-2:] = -60
    u = sequence_input(mixer)
    v, k, q = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in mixer.in_proj(u)[..., :24].chunk(3, dim=-1))
    attention = ((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(u), mixer.out_proj(attention))


@pytest.mark.parametrize("channels", [None, [5, 0, 7]])
def test_effective_matrix_gives_the_gated_signal(channels):
    mixer = small(rmsnorm=False, expand=1)
    with torch.no_grad():
        mixer.out_proj.weight.copy_(torch.eye(8))
    x = sequence_input(mixer)
    found = mixer.mixing_matrix(x, effective=True, channels=channels)
    torch.testing.assert_close(found.apply(), found.outputs)
    assert not found.matrix.triu(1).any()
    chosen = slice(None) if channels is None else channels
    torch.testing.assert_close(found.outputs[..., 0], mixer(x)[..., chosen])
    torch.testing.assert_close(found.inputs[..., 0], mixer.in_proj(x)[..., 8:16][..., chosen])
    assert found.offset is not None
    assert found.offset.any()


def test_states_stay_precise_under_autocast():
    """dt = 1e-3 and A = -1 over 4,096 steps: a state rounded to bfloat16 would be half gone."""
    torch.manual_seed(0)
    mixer = Mamba2(8, d_state=4, headdim=4)
    with torch.no_grad():
        mixer.A_log.zero_()
        mixer.in_proj.weight[-4:] = 0
        mixer.dt_bias.fill_(-6.907255)
    x = torch.randn(1, 4096, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        state = mixer.init_state(1)
        for position in x.unbind(1):
            _, state = mixer.step(position, state)
        _, chunked = mixer.prefill(x)
        conv = mixer.in_proj(x)[..., 16:40]
    # The exact recurrence of the same rounded inputs.
    xBC, _ = causal_conv1d(conv, mixer.conv1d.weight[:, 0], mixer.conv1d.bias)
    u, B, C = xBC.double().split([16, 4, 4], dim=-1)
    dt = F.softplus(mixer.dt_bias.double()).expand(1, 4096, 4)
    _, exact = ssd(u.unflatten(-1, (4, 4)), -dt, B[:, :, None], C[:, :, None], weight=dt)
    assert relative_error(state.ssm, exact) < 1e-4
    assert relative_error(chunked.ssm, exact) < 1e-4


def test_extreme_steps_stay_finite():
    mixer = small(dtype=torch.float32)
    with torch.no_grad():
        mixer.A_log.copy_(torch.tensor([12.0, 5.0, -20.0, 0.0]))
        mixer.dt_bias.copy_(torch.tensor([10.0, -80.0, 10.0, 0.0]))
    x = sequence_input(mixer, 300).requires_grad_()
    mixer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *mixer.parameters()])
    assert relative_error(mixer(x), mixer.double()(x.double())) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headdim": 5}, "`headdim` must divide the 16 inner channels, got 5"),
        ({"ngroups": 3}, "`ngroups` must divide the 4 heads"),
        ({"d_ssm": 20}, "`d_ssm` must lie in 1 to d_inner=16, got 20"),
        ({"d_state": 0}, "`d_state` must be at least 1, got 0"),
        ({"dt_limit": (1.0, 0.5)}, "`dt_limit` must be"),
        ({"A_init_range": (0, 1)}, "`A_init_range`"),
        ({"d_conv": 9}, "`d_conv` must lie in 1 to 8, got 9"),
        ({"mup_vector": (1, 2)}, "`mup_vector` must hold 5 factors"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
