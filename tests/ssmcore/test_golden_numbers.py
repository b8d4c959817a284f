"""Numbers computed once from the equations in float64, for the recurrences of the mixers.

Inputs are waves: element i (row-major) of a tensor with a seed is sin(0.7 i + 1.3 seed + 0.1).
"""

import math

import pytest
import torch
import torch.nn.functional as F

from omnissm.kernels import causal_conv1d, gated_norm, quasiseparable, selective_scan, ssd
from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.hippo import normal_form
from omnissm.ssmcore.mixers.common import Layout, lay_out

PATHS = pytest.mark.parametrize("backend", ["reference", "chunked"])


def waves(*shape, seed):
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * index + 1.3 * seed + 0.1).reshape(shape)


def close(values, *expected):
    torch.testing.assert_close(
        values.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0, check_dtype=False
    )


@PATHS
def test_selective_scan(backend):
    inputs = waves(1, 5, 3, seed=1), F.softplus(waves(1, 5, 3, seed=2)), -waves(3, 2, seed=3).exp()
    maps = waves(1, 5, 2, seed=4), waves(1, 5, 2, seed=5)
    y, h = selective_scan(*inputs, *maps, waves(3, seed=6), backend=backend)
    close(y.sum(), -0.883269754)
    close(y[0, -1], -0.452907574, -0.707955161, -0.221660966)
    close(h.sum(), 0.101559649)
    y, _ = selective_scan(*inputs, *maps, window=3, backend=backend)
    close(y.sum(), -3.646690470)
    close(y[0, 0], -0.836340560, -0.436659365, -0.221177634)


def scan_of_mamba2():
    dt = F.softplus(waves(1, 6, 2, seed=2))
    inputs = {"x": waves(1, 6, 2, 2, seed=1), "log_decay": -dt * waves(2, seed=3).exp(), "weight": dt}
    return inputs | {"B": waves(1, 6, 1, 3, seed=4), "C": waves(1, 6, 1, 3, seed=5), "D": waves(2, seed=6)}


@PATHS
def test_ssd(backend):
    inputs = scan_of_mamba2()
    y, h = ssd(**inputs, backend=backend)
    close(y.sum(), -2.418511079)
    close(y[0, -1], 0.639741045, -1.785223901, -2.843317320, -2.814192065)
    close(h.sum(), 6.197916479)
    row = torch.autograd.functional.jacobian(
        lambda x: ssd(**inputs | {"x": x}, backend=backend)[0][0, 5, 0, 0], inputs["x"]
    )
    close(row[0, :, 0, 0], 0.158434744, -0.154343841, 0.108566512, 0.391646101, -1.833481042, 1.593238429)


@PATHS
def test_ssd_from_a_state_and_with_a_reset(backend):
    inputs, state = scan_of_mamba2(), waves(1, 2, 2, 3, seed=7)
    y, h = ssd(**inputs, initial_state=state, backend=backend)
    close(y.sum(), -2.722359322)
    close(h.sum(), 6.191033539)
    reset = torch.arange(6)[None] == 3
    layout = lay_out(inputs["x"].flatten(2), reset=reset)
    y, h = ssd(**inputs, initial_state=layout.restart(state), seq_idx=layout.index, backend=backend)
    close(y.sum(), -1.383355519)
    close(h.sum(), 7.765405925)


@PATHS
def test_quasiseparable(backend):
    x, rates = waves(1, 5, 2, 2, seed=1), -waves(2, seed=4).exp()
    dt = [F.softplus(waves(1, 5, 2, seed=seed)) for seed in (2, 3)]
    B_f, C_f, B_b, C_b = (waves(1, 5, 1, 2, seed=seed) for seed in (5, 6, 7, 8))
    diagonal = waves(1, 5, 2, seed=9)

    def mix(x):
        sides = dt[0] * rates, dt[0], B_f, C_f, dt[1] * rates, dt[1], B_b, C_b
        return quasiseparable(x, *sides, diagonal, backend=backend)[0]

    y = mix(x)
    close(y.sum(), -5.652489130)
    close(y[0, 0], -0.573291108, -0.325501761, 0.079188783, 0.158723789)
    close(y[0, -1], -0.075327981, -0.841727337, -0.993501371, -0.780966853)
    row = torch.autograd.functional.jacobian(lambda x: mix(x)[0, 2, 0, 0], x)
    close(row[0, :, 0, 0], -0.336078050, -0.086813454, 0.894791172, 1.180191883, 0.255877688)


def test_discrete_mamba2():
    """Through the module, with projections and convolution that pass everything on."""
    x, B, C = waves(1, 5, 4, seed=1), waves(1, 5, 6, seed=3), waves(1, 5, 6, seed=4)
    a = waves(1, 5, 2, seed=2)
    mixer = create_mixer("discrete_mamba2", 22, expand=4 / 22, nheads=2, d_state=3, dtype=torch.float64)
    mixer.attention_init_()
    with torch.no_grad():
        mixer.in_proj.weight.copy_(torch.eye(22))
        mixer.out_proj.weight.copy_(torch.eye(22, 4))
        mixer.D.copy_(waves(2, seed=5))
    y, state = mixer.prefill(torch.cat([x, B, C, torch.zeros_like(x), a], dim=-1))
    close(y.sum(), 0.592785556)
    close(y[0, -1, :4], -0.157736856, -0.391276913, 1.101134474, 1.023787776)
    close(state.ssm.sum(), -3.657980938)


@PATHS
def test_gated_norm(backend):
    inputs = waves(2, 8, seed=1), waves(2, 8, seed=2), waves(8, seed=3)
    for norm_first, group, expected in (
        (False, 8, (-1.258501195, 0.628025717, 0.423030300, -0.111993543)),
        (False, 4, (-1.284597681, 0.641048561, 0.431802326, -0.114315859)),
        (True, 8, (-0.270292212, 0.134883034, 0.090855532, -0.024053201)),
        (True, 4, (-0.276187983, 0.137825182, 0.092837326, -0.024577864)),
    ):
        y = gated_norm(*inputs, group_size=group, norm_before_gate=norm_first, backend=backend)
        close(y[0, :4], *expected)


@PATHS
def test_causal_conv(backend):
    y, _ = causal_conv1d(
        waves(1, 5, 2, seed=1), waves(2, 4, seed=2), waves(2, seed=3), waves(1, 2, 3, seed=4), backend=backend
    )
    close(y[0, -1], -0.196084189, 0.169353609)
    close(y.sum(), -0.777138526)


def test_s5():
    u, start = waves(1, 6, 2, seed=6), torch.stack([waves(1, 2, seed=7), waves(1, 2, seed=8)], dim=-1)
    mixer = create_mixer("s5", 2, d_state=4, dtype=torch.float64)
    with torch.no_grad():
        mixer.Lambda_re.copy_(torch.tensor([-0.5, -0.25]))
        mixer.Lambda_im.copy_(torch.tensor([math.pi, 1.0], dtype=torch.float64))
        mixer.log_step.copy_(torch.tensor([0.1, 0.2], dtype=torch.float64).log())
        mixer.B.copy_(torch.stack([waves(2, 2, seed=1), waves(2, 2, seed=2)], dim=-1))
        mixer.C.copy_(torch.stack([waves(1, 2, 2, seed=3), waves(1, 2, 2, seed=4)], dim=-1))
        mixer.D.copy_(waves(2, seed=5))
    state = mixer.state_type(start)
    _, last = mixer.prefill(u, state)
    y = mixer.mixing_matrix(u, state=state).outputs
    close(y.sum(), -8.857437555)
    close(y[0, -1], -1.837008029, -0.034768993)
    close(last.ssm, 0.665361381, 0.400730276, 0.634537762, -0.810929528)
    first, rest = (
        mixer.mixing_matrix(part, state=given).outputs for part, given in ((u[:, :3], state), (u[:, 3:], None))
    )
    close(first.sum() + rest.sum(), -2.732250207)
    close(rest[0, -1], -0.346809451, 0.441663296)


def test_s4_with_a_dense_matrix():
    """The bilinear kernel of LegS, from its diagonal plus low rank form."""
    mixer = create_mixer("s4", 1, d_state=4, dtype=torch.float64)
    V = normal_form("legs", 4).V
    with torch.no_grad():
        mixer.inv_dt.fill_(math.log(0.1))
        mixer.C.copy_(torch.view_as_real(waves(4, seed=1).to(V.dtype) @ V)[None, None])
    kernel, _ = mixer._kernels(6)
    close(kernel, 0.227090347, 0.207507879, 0.170434752, 0.130051811, 0.093219282, 0.062672525)


def test_h3():
    mixer = create_mixer("h3", 2, d_state=4, dtype=torch.float64)
    with torch.no_grad():
        mixer.shift_C.zero_()
        mixer.shift_C[:, :3] = waves(2, 3, seed=4)
        mixer.shift_D.copy_(waves(2, seed=5))
        mixer.D.copy_(waves(2, seed=6))
        mixer.A_real.fill_(math.log(0.5))
        mixer.A_imag.copy_(torch.tensor([0.0, math.pi], dtype=torch.float64))
        mixer.inv_dt.copy_(torch.tensor([[0.1], [0.05]], dtype=torch.float64).log())
        mixer.C.copy_(torch.stack([waves(2, 2, seed=7), waves(2, 2, seed=8)], dim=-1))
    q, k, v = (waves(1, 6, 2, seed=seed) for seed in (1, 2, 3))
    y, _ = mixer._mix(q, k, v, None, lay_out(q))
    close(y.sum(), 0.415516924)
    close(y[0, -1], -0.094156016, 0.130773406)
    close(mixer._shift(k, torch.zeros(1, 2, 3), lay_out(k))[0][0, -1], 0.123613346, -0.482125917)


def test_toeplitz_matrix():
    mixer = create_mixer("toeplitz", 4, headdim=8, max_len=4, dtype=torch.float64)
    f, r = (waves(1, 1, 4, 1, seed=seed) for seed in (1, 2))
    rows = mixer._matrix(f, r, Layout()) * 2 * 2  # without the scale 1 / (2 sqrt(L))
    close(rows[0, 0, 1], 0.863209367, 0.985449730, -0.255541102, -0.818277111)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("low_rank", (0.095042949, 0.030751180, -0.084589568)),
        ("cauchy", (0.268556339, 0.340689397, 0.296734543)),
        ("softmax_mixer", (0.380628107, 0.340517389, 0.278854504)),
    ],
)
def test_matrices_of_queries_and_keys(name, row):
    mixer = create_mixer(name, 4, headdim=8, qk_dim=2, max_len=3, dtype=torch.float64)
    close(mixer._matrix(waves(1, 1, 3, 2, seed=1), waves(1, 1, 3, 2, seed=2), Layout())[0, 0, 1], *row)


def test_paragru():
    mixer = create_mixer("paragru", 4, headdim=4, bound=2.0, dtype=torch.float64)
    with torch.no_grad():
        mixer.A.copy_(0.5 * waves(3, 4, seed=2))
        mixer.B.copy_(waves(1, 4, 3, 4, seed=3))
        mixer.b.copy_(waves(3, 4, seed=4))
    x = waves(1, 5, 4, seed=1)
    h, last = mixer._solve(mixer._drive(x), torch.zeros(1, 4, dtype=torch.float64), lay_out(x))
    close(last, -0.636156397, -0.652394010, -0.265505355, 0.239861894)
    close(mixer._loop(mixer._drive(x), torch.zeros(1, 4, dtype=torch.float64), lay_out(x)), *h.flatten().tolist())
