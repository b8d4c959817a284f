"""H3: its sum over pairs written out, its special cases, and its sizes."""

import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers import H3

DOUBLE = {"dtype": torch.float64}


def test_heads_written_out():
    torch.manual_seed(0)
    mixer = H3(6, d_state=4, headdim=3, **DOUBLE)
    x = torch.randn(1, 9, 6, **DOUBLE)
    q, k, v = (layer(x)[0].unflatten(1, (2, 3)) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    C, D = mixer.shift_C.unflatten(0, (2, 3)), mixer.shift_D.unflatten(0, (2, 3))
    A = torch.complex(-mixer.A_real.exp(), mixer.A_imag)
    factor = (mixer.inv_dt.exp() * A).exp()
    weights = torch.view_as_complex(mixer.C) * torch.view_as_complex(mixer.B) * (factor - 1) / A
    y = torch.zeros(9, 3, 2, **DOUBLE)  # (l, channel of a head, head)
    shifted = [
        sum((C[..., i] * k[t - i] for i in range(min(4, t + 1))), start=torch.zeros(2, 3, **DOUBLE)) + D * k[t]
        for t in range(9)
    ]
    for t in range(9):
        for s in range(t + 1):
            kernel = 2 * (weights * factor ** (t - s)).real.sum(-1) + (mixer.D if s == t else 0)
            for j in range(3):
                y[t, j] += kernel * (q[t] * shifted[s]).sum(-1) * v[s, :, j]
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y.flatten(1)))


def test_without_shift_and_decay_it_is_linear_attention():
    torch.manual_seed(0)
    mixer = H3(4, d_state=2, headdim=4, init="real", **DOUBLE)
    with torch.no_grad():
        mixer.shift_C.zero_()
        mixer.shift_D.fill_(1)
        mixer.D.zero_()
        mixer.A_real.fill_(-40.0)  # A = -4e-18: the state forgets nothing
        mixer.A_imag.fill_(1e-9)
        mixer.C.copy_(torch.tensor([0.5, 0.0], **DOUBLE) / mixer.inv_dt.exp()[..., None])
    found = mixer.mixing_matrix(x := torch.randn(1, 8, 4, **DOUBLE))
    expected = (mixer.q_proj(x) @ mixer.k_proj(x).mT).tril()
    torch.testing.assert_close(found.matrix[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_parameters_and_state():
    d, n = 8, 16
    for e in (1, 4):
        mixer = H3(d, d_state=n, headdim=e)
        heads = d // e
        expected = 4 * (d * d + d) + d * n + d + heads * (1 + n // 2 * 6 + 1)
        assert sum(p.numel() for p in mixer.parameters()) == expected
        assert mixer.state_numel() == d * (n - 1) + d * e * n


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 5}, "even and at least 2"),
        ({"headdim": 3}, "`headdim` must divide the 4"),
        ({"init": "line"}, "`init` must be one of"),
        ({"dt_min": 0.5}, "0 < dt_min <= dt_max"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("h3", 4, **options)
