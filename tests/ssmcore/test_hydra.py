"""Hydra: the equations position by position, the structure of its matrix, reversal, options."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.ssmcore.mixers import Hydra
from omnissm.ssmcore.testing import sequence_input


def small(**options):
    torch.manual_seed(0)
    return Hydra(8, **{"d_state": 2, "headdim": 4, "dtype": torch.float64, **options})


def by_the_book(m, u):
    """The equations with loops over positions and heads, for one row."""
    G, N, P, c = m.ngroups, m.d_state, m.headdim, m.d_inner
    z, signal, *raw = F.linear(u, m.in_proj.weight, m.in_proj.bias).split(
        [c, c + 4 * G * N, m.nheads, m.nheads], dim=-1
    )
    K = m.conv1d.kernel_size[0]
    padded = F.pad(signal, (0, 0, K // 2, K // 2))
    bias = 0 if m.conv1d.bias is None else m.conv1d.bias
    taps = m.conv1d.weight[:, 0].T
    convolved = F.silu(torch.stack([bias + (taps * padded[t : t + K]).sum(0) for t in range(len(u))]))
    x, *maps = convolved.split([c, *4 * [G * N]], dim=-1)
    y = torch.zeros_like(x)
    diagonal = F.linear(x, m.fc_D.weight) + m.D
    for h in range(m.nheads):
        g, channels = h // (m.nheads // G), slice(h * P, (h + 1) * P)
        y[:, channels] = diagonal[:, h, None] * x[:, channels]
        for side, order, step in ((0, range(len(u)), 1), (1, range(len(u) - 1, -1, -1), -1)):
            B, C = (t[:, g * N : (g + 1) * N] for t in maps[2 * side : 2 * side + 2])
            state = m.init_states[h] if hasattr(m, "init_states") else torch.zeros(P, N, dtype=u.dtype)
            for t in order:
                dt = F.softplus(raw[side][t, h] + m.dt_bias[h]).clamp(*m.dt_limit)
                state = torch.exp(-dt * m.A_log[h].exp()) * state + dt * torch.outer(x[t, channels], B[t])
                if 0 <= t + step < len(u):
                    y[t + step, channels] = y[t + step, channels] + state @ C[t]
    y = F.rms_norm(y, (c,), m.norm.weight, m.norm.eps) * F.silu(z)
    return F.linear(y, m.out_proj.weight, m.out_proj.bias)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ngroups": 2, "d_conv": 3, "dt_limit": (0.01, 0.05), "norm_eps": 1e-2},
        {"ngroups": 4, "bias": True, "learnable_init_states": True, "conv_bias": False, "expand": 4},
    ],
    ids=str,
)
def test_equations(options):
    mixer = small(**options)
    with torch.no_grad():
        for name in ("D", "A_log", "init_states"):
            if name in mixer._parameters:
                mixer._parameters[name].normal_()
    x = sequence_input(mixer, 9)
    expected = torch.stack([by_the_book(mixer, row) for row in x])
    torch.testing.assert_close(mixer(x), expected, atol=1e-10, rtol=1e-10)


def test_parameters_are_those_of_the_published_module():
    assert sum(p.numel() for p in Hydra(768).parameters()) == 3_825_224
    shapes = {name: tuple(p.shape) for name, p in small(learnable_init_states=True).named_parameters()}
    assert shapes == {
        "in_proj.weight": (16 + 16 + 8 + 8, 8),
        "conv1d.weight": (24, 1, 7),
        "conv1d.bias": (24,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "fc_D.weight": (4, 16),
        "norm.weight": (16,),
        "init_states": (4, 4, 2),
        "out_proj.weight": (8, 16),
    }
    mixer = small()
    assert (mixer.A_log == 0).all()
    assert (mixer.D == 1).all()


def test_blocks_off_the_diagonal_have_the_rank_of_the_state():
    matrix = small().mixing_matrix(sequence_input(small(), 16)).matrix
    for t in range(1, 16):
        for block in (matrix[:, :, t:, :t], matrix[:, :, :t, t:]):
            values = torch.linalg.svdvals(block)
            assert (values[..., 2:] < 1e-8 * values[..., :1]).all()
    assert torch.linalg.matrix_rank(matrix).min() == 16


def test_without_inputs_to_the_states_only_the_diagonal_is_left():
    mixer = small(conv_bias=False)
    with torch.no_grad():
        mixer.conv1d.weight[16:] = 0  # B and C of both directions
    found = mixer.mixing_matrix(sequence_input(mixer))
    diagonal = torch.diagonal(found.matrix, dim1=2, dim2=3)
    assert torch.equal(found.matrix, torch.diag_embed(diagonal))
    expected = F.linear(found.inputs.flatten(2), mixer.fc_D.weight) + mixer.D
    torch.testing.assert_close(diagonal.mT, expected)


def test_reversed_inputs_and_exchanged_directions_reverse_the_output():
    mixer, mirrored = small(), small()
    with torch.no_grad():
        order = torch.cat([torch.arange(32), torch.arange(36, 40), torch.arange(32, 36), torch.arange(44, 48)])
        order = torch.cat([order, torch.arange(40, 44)])
        mirrored.in_proj.weight.copy_(mixer.in_proj.weight[order])
        channels = torch.cat([torch.arange(16), torch.arange(20, 24), torch.arange(16, 20)])
        mirrored.conv1d.weight.copy_(mixer.conv1d.weight[channels].flip(2))
        mirrored.conv1d.bias.copy_(mixer.conv1d.bias[channels])
    x = sequence_input(mixer)
    torch.testing.assert_close(mirrored(x.flip(1)), mixer(x).flip(1))


def test_effective_matrix_gives_the_gated_signal():
    mixer = small()
    x = sequence_input(mixer)
    found = mixer.mixing_matrix(x, effective=True)
    torch.testing.assert_close(found.apply(), found.outputs)
    plain = mixer.mixing_matrix(x)
    gate = F.silu(mixer.in_proj(x)[..., :16])
    torch.testing.assert_close(found.outputs[..., 0], plain.outputs.flatten(2) * gate)
    torch.testing.assert_close(found.inputs[..., 0], mixer.in_proj(x)[..., 16:32])
    some = mixer.mixing_matrix(x, effective=True, channels=[3])
    torch.testing.assert_close(some.matrix, found.matrix[:, 3:4])


def test_the_amount_of_padding_does_not_matter():
    mixer = small(learnable_init_states=True)
    torch.nn.init.normal_(mixer.init_states)
    x = sequence_input(mixer, 7)
    for left, right in ((0, 1), (5, 0), (40, 30)):
        mask = F.pad(torch.ones(2, 7, dtype=torch.bool), (left, right))
        y = mixer(F.pad(x, (0, 0, left, right), value=3.0), mask=mask)
        torch.testing.assert_close(y[:, left : left + 7], mixer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"d_conv": 4}, "`d_conv` must be odd"), ({"headdim": 3}, "`headdim` must divide the 16 inner channels")],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_what_needs_a_direction_is_refused():
    mixer = small()
    x = sequence_input(mixer)
    for call in (mixer.prefill, mixer.step, mixer.init_state):
        with pytest.raises(TypeError, match="Hydra sees both directions"):
            call(x)
    with pytest.raises(TypeError, match="Hydra sees both directions"):
        mixer.flops(10, mode="decode")
