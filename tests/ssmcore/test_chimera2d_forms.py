"""Chimera's other forms: the convolution equals the recurrence, companion matrices and rotation equal plain loops."""

import pytest
import torch

from omnissm.ssmcore import Chimera2D
from omnissm.ssmcore.mixers.chimera2d_forms import companion_response, convolve_grid, scan_rotating
from omnissm.ssmcore.mixers.companion import companion_matrix, unit_norm

DOUBLE = torch.float64


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (5, 9), (9, 40)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coupling": "none"},
        {"coupling": "time_to_variate", "bidirectional": False},
        {"coupling": "variate_to_time"},
        {"mix_variates": False},
        {"rotation": (3.0,)},
        {"seasonal_input": "residual", "input_discretization": "zoh", "rotation": (4.0, 2.5)},
    ],
    ids=str,
)
def test_constant_parameters_are_a_convolution(options, grid):
    """With gaps of 1 the same mixer takes the scan; (9, 40) is convolved by FFT, the others by matrices."""
    torch.manual_seed(0)
    mixer = Chimera2D(4, d_state=3, selective=False, dtype=DOUBLE, **options)
    x, mask = torch.randn(2, *grid, 4, dtype=DOUBLE), torch.rand(2, *grid) < 0.7
    scanned = mixer(x, mask=mask, time_gap=torch.ones(2, grid[1], dtype=DOUBLE))
    scanned.square().sum().backward()
    wanted = {name: p.grad for name, p in mixer.named_parameters()}  # None where a grid of one column uses none
    mixer.zero_grad(set_to_none=True)
    folded = mixer(x, mask=mask)
    torch.testing.assert_close(folded, scanned, rtol=1e-6, atol=1e-6)  # rotation is computed in float32
    folded.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        found, expected = (torch.zeros(()) if g is None else g for g in (parameter.grad, wanted[name]))
        assert (found - expected).abs().max() < 1e-4 * (1 + expected.abs().max()), name


def test_convolution_by_its_definition():
    u, kernel = torch.randn(2, 3, 2, 3, 2, dtype=DOUBLE), torch.randn(2, 3, 3, 2, dtype=DOUBLE)
    y = torch.zeros_like(u)
    for i in range(2):
        for j in range(3):
            for p in range(2):
                for q in range(j + 1):
                    y[:, :, i, j] += kernel[:, i - p + 1, j - q][:, None] * u[:, :, p, q]
    torch.testing.assert_close(convolve_grid(u, kernel), y)


def companion_loop(a1, a2, share, a3, a4, B, C, grid):
    first, second = (companion_matrix(unit_norm(a)) for a in (a1, a2))
    rows, columns = grid
    h1, h2, y = {}, {}, torch.zeros(len(a1), rows, columns, a1.shape[1], dtype=a1.dtype)
    none = torch.zeros_like(a1)
    for i in range(rows):
        for j in range(columns):
            u = float(i == 0 and j == 0)
            left1, left2 = h1.get((i, j - 1), none), h2.get((i, j - 1), none)
            above1, above2 = h1.get((i - 1, j), none), h2.get((i - 1, j), none)
            turned = share * (first @ left1[..., None])[..., 0] + (1 - share) * (second @ left2[..., None])[..., 0]
            h1[i, j] = turned + unit_norm(B[0]) * u
            h2[i, j] = a3 * above1 + a4 * above2 + unit_norm(B[1]) * u
            y[:, i, j] = (C[0] * h1[i, j] + C[1] * h2[i, j]).sum(-1)
    return y


def test_companion_response_is_the_recurrence():
    torch.manual_seed(0)
    a1, a2, a3, b1, b2, c1, c2 = torch.randn(7, 2, 3, 4, dtype=DOUBLE).unbind(0)
    a4, share = torch.rand(2, 3, 4, dtype=DOUBLE), torch.rand(2, 3, 1, dtype=DOUBLE)
    parts = (a1, a2, share, 0.3 * torch.tanh(a3), a4, (b1, b2), (c1, c2), (3, 5))
    torch.testing.assert_close(companion_response(*parts), companion_loop(*parts))


def test_companion_states_never_grow():
    torch.manual_seed(0)
    mixer = Chimera2D(8, d_state=4, structure="companion", selective=False, gate=False, d_conv=0)
    response = mixer._companion_response(slice(0, 4), (7, 400)).detach()
    bound = mixer.C_const.detach().abs().amax(-1).sum(0) + 1  # |C|_inf |h|_1, and the skip
    assert (response.abs().amax((1, 2)) <= bound).all()
    assert response[:, :, -1].abs().max() < 1.0


def test_companion_holds_an_autoregression():
    """x_t = 0.5 x_{t-2} - 0.3 x_{t-3} is the response along time of one variate."""
    n = 4
    a = torch.tensor([0.0, -0.3, 0.5, 0.0], dtype=DOUBLE)[None, None]  # the last column, lag n first
    a = torch.cat([a[..., :-1], 1 - a[..., :-1].abs().sum(-1, keepdim=True)], -1)  # 1-norm 1: lag 1 takes the rest
    first = torch.zeros(1, 1, n, dtype=DOUBLE)
    first[..., 0] = 1.0
    last = torch.zeros(1, 1, n, dtype=DOUBLE)
    last[..., -1] = 1.0
    zero = torch.zeros_like(first)
    y = companion_response(a, None, zero, None, zero, (first, first), (last, zero), (1, 12))[0, 0, :, 0]
    expected = torch.zeros(12, dtype=DOUBLE)
    expected[n - 1] = 1.0
    coefficients = a[0, 0].flip(0)  # of lags 1, 2, ..
    for t in range(n, 12):
        expected[t] = sum(coefficients[lag] * expected[t - 1 - lag] for lag in range(n) if t - 1 - lag >= 0)
    torch.testing.assert_close(y, expected)


def rotating_loop(u, dt1, dt2, rate, speed, phase, alpha4, c2, c3, maps, gap):
    B1, B2, C1, C2 = maps
    batch, rows, columns, width = u.shape
    h1, h2, y = {}, {}, torch.zeros_like(u)
    none = torch.zeros(batch, width, rate.shape[-1], dtype=torch.complex128)
    turn = torch.complex(-rate, speed)[:, 0, 0]
    for i in range(rows):
        for j in range(columns):
            step = dt1[:, i, j, :, None] * gap[:, j, None, None]
            a1 = torch.exp(step * turn)
            a2 = c2[:, 0, 0] * rate[:, 0, 0] * (a1 - 1) / turn
            a4 = torch.exp(-dt2[:, i, j, :, None] * alpha4[:, 0, 0])
            a3 = c3[:, 0, 0] * (1 - a4)
            x = u[:, i, j, :, None]
            h1[i, j] = (
                a1 * h1.get((i, j - 1), none)
                + a2 * h2.get((i, j - 1), none)
                + dt1[:, i, j, :, None] * B1[:, i, j, None] * x
            )
            h2[i, j] = (
                a3 * h1.get((i - 1, j), none)
                + a4 * h2.get((i - 1, j), none)
                + dt2[:, i, j, :, None] * B2[:, i, j, None] * x
            )
            read = (torch.exp(1j * phase[:, 0, 0]) * h1[i, j]).real
            y[:, i, j] = (C1[:, i, j, None] * read + C2[:, i, j, None] * h2[i, j].real).sum(-1)
    return y


def rotating_parts(batch=2, rows=3, columns=5, width=2, n=3):
    torch.manual_seed(0)
    positive = [torch.rand(batch, 1, 1, width, n, dtype=DOUBLE) for _ in range(2)]
    free = [torch.randn(batch, 1, 1, width, n, dtype=DOUBLE) for _ in range(4)]
    speed, phase, c2, c3 = free
    dts = torch.rand(2, batch, rows, columns, width, dtype=DOUBLE)
    maps = tuple(torch.randn(4, batch, rows, columns, n, dtype=DOUBLE))
    u = torch.randn(batch, rows, columns, width, dtype=DOUBLE)
    return [u, *dts, positive[0], speed, phase, positive[1], 0.9 * torch.tanh(c2), 0.9 * torch.tanh(c3), maps]


def test_rotation_is_the_recurrence():
    parts, gap = rotating_parts(), 1 + torch.rand(2, 5, dtype=DOUBLE)
    torch.testing.assert_close(scan_rotating(*parts, time_gap=gap), rotating_loop(*parts, gap))


def test_without_speed_and_phase_rotation_is_the_plain_model():
    torch.manual_seed(0)
    turning = Chimera2D(4, d_state=3, rotation=(3.0,))
    plain = Chimera2D(4, d_state=3)
    plain.load_state_dict(turning.state_dict(), strict=False)
    x = torch.randn(2, 5, 6, 4)
    assert (turning(x) - plain(x)).abs().max() > 1e-3
    with torch.no_grad():
        turning.speed.zero_()
        turning.phase.zero_()
    torch.testing.assert_close(turning(x), plain(x), rtol=1e-4, atol=1e-5)


def test_states_turn_once_in_a_period():
    """The response of one variate to an impulse has its spectral peak at the period that was asked for."""
    torch.manual_seed(0)
    options = {"heads": ("seasonal",), "gate": False, "selective": False, "d_conv": 0, "mix_variates": False}
    mixer = Chimera2D(1, d_state=1, rotation=(8.0,), seasonal_dt=(0.02, 0.02), **options)
    with torch.no_grad():
        mixer.D.zero_()
        mixer.in_proj.weight.fill_(1.0)
        mixer.out_proj.weight.fill_(1.0)
    x = torch.zeros(1, 1, 64, 1)
    x[:, :, 0] = 1.0
    spectrum = torch.fft.rfft(mixer(x)[0, 0, :, 0]).abs()
    assert int(spectrum[1:].argmax()) + 1 == 8  # 64 / 8


@pytest.mark.parametrize("options", [{"structure": "companion", "selective": False}, {"rotation": (3.0, 6.0)}], ids=str)
def test_forms_keep_the_contract(options):
    torch.manual_seed(0)
    mixer = Chimera2D(4, d_state=3, **options)
    x = torch.randn(2, 3, 6, 4, requires_grad=True)
    mixer(x)[:, :, 3].sum().backward()
    late = x.grad[:, :, 4:].abs().max()
    assert late < 1e-6 * x.grad.abs().max()
    missing = [name for name, p in mixer.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []
    names = {"companion", "companion2", "share"} if "structure" in options else {"speed", "phase"}
    assert names <= set(mixer.no_decay_names())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "companion"}, "pass selective=False"),
        ({"structure": "companions"}, "one of 'diagonal', 'companion'"),
        ({"rotation": (1.0,)}, "periods of at least 2 tokens"),
        ({"rotation": (3.0,), "heads": ("trend",)}, "turns the diagonal seasonal head"),
        ({"rotation": (3.0,), "coupling": "pooled"}, "turns the diagonal seasonal head"),
    ],
)
def test_forms_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Chimera2D(4, **options)


def test_companion_refuses_gaps():
    mixer = Chimera2D(4, structure="companion", selective=False)
    with pytest.raises(ValueError, match="leave out `time_gap`"):
        mixer(torch.zeros(1, 2, 3, 4), time_gap=torch.ones(1, 3))
