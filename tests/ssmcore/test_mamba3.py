"""Mamba-3: the equations as a loop, what it reduces to, sizes, steps and numerics."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from omnissm.kernels import ssd
from omnissm.kernels.testing import relative_error
from omnissm.ssmcore.mixers import Mamba3
from omnissm.ssmcore.mixers.mamba3 import Mamba3State, heavy_tail

DOUBLE = {"dtype": torch.float64}
VARIANTS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3},
        {"rank": 2, "ngroups": 2, "outproj_norm": True, "rope_fraction": 1.0},
        {"rotation": "half", "a_activation": "softplus", "dt_limit": (0.01, 0.05), "outproj_norm": True},
        {"d_state": 7, "ngroups": 8, "rope_fraction": 0.0},
    ],
    ids=str,
)


def small(**options):
    """A mixer whose parameters are all of size 1, so that every one matters."""
    torch.manual_seed(0)
    mixer = Mamba3(16, **{"d_state": 8, "headdim": 4, **DOUBLE, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return mixer


def rotated(x, phi, rotation):
    """Complex numbers times e^{i phi}: x (b, h, n), phi (b, h, s)."""
    count, half = phi.shape[-1], x.shape[-1] // 2
    for pair in range(count):
        first, second = (pair, pair + half) if rotation == "half" else (2 * pair, 2 * pair + 1)
        turned = torch.complex(x[..., first], x[..., second]) * torch.polar(
            torch.ones_like(phi[..., 0]), phi[..., pair]
        )
        x = x.clone()
        x[..., first], x[..., second] = turned.real, turned.imag
    return x


def equations(m, u):
    """The published equations, position by position and rank by rank."""
    h, p, r, g, n = m.nheads, m.headdim, m.rank, m.ngroups, m.d_state
    state, phi, before = torch.zeros(u.shape[0], h, p, n, **DOUBLE), 0, 0
    outputs = []
    for t in range(u.shape[1]):
        z, x, B, C, dt, A, lam, theta = m.in_proj(u[:, t]).split(m.splits, dim=-1)
        B, C = (
            (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight).repeat_interleave(h // g, dim=2)
            for v, norm in ((B.reshape(-1, r, g, n), m.B_norm), (C.reshape(-1, r, g, n), m.C_norm))
        )
        z, x = z.reshape(-1, h, p), x.reshape(-1, h, p)
        dt = F.softplus(dt + m.dt_bias).clamp(*m.dt_limit)
        rate = F.softplus(A) if m.a_activation == "softplus" else torch.where(A >= 0, 1 + A, 1 / (1 - A))
        decay, lam = torch.exp(-rate.clamp(min=m.A_floor) * dt), lam.sigmoid()
        phi = phi + math.pi * theta.tanh()[:, None] * dt[..., None]
        now = 0
        for rank in range(r):
            k = rotated(B[:, rank] + m.B_bias[:, rank], phi, m.rotation)
            v = x if r == 1 else x * m.mimo_x[:, rank]
            now = now + v[..., None] * k[..., None, :]
        earlier = ((1 - lam) * dt * decay)[..., None, None] * before
        state = decay[..., None, None] * state + earlier + (lam * dt)[..., None, None] * now
        before, out = now, 0
        for rank in range(r):
            q = rotated(C[:, rank] + m.C_bias[:, rank], phi, m.rotation)
            v, gate = (x, z) if r == 1 else (x * m.mimo_x[:, rank], z * m.mimo_z[:, rank])
            y = (state * q[..., None, :]).sum(-1) + m.D[:, None] * v
            if m.norm is not None:
                y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight.reshape(h, p)
            y = y * F.silu(gate)
            out = out + (y if r == 1 else y * m.mimo_o[:, rank])
        outputs.append(m.out_proj(out.flatten(1)))
    return torch.stack(outputs, 1), state, phi


@VARIANTS
def test_equations(options):
    mixer, u = small(**options), torch.randn(2, 21, 16, **DOUBLE)
    y, state, phi = equations(mixer, u)
    found, final = mixer.prefill(u)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(final.ssm, state)
    torch.testing.assert_close(final.phi.cos(), phi.cos() if mixer.angles else final.phi)


@VARIANTS
@pytest.mark.parametrize("cut", [1, 7, 20])
def test_pieces_and_steps(options, cut):
    mixer, u = small(**options), torch.randn(2, 21, 16, **DOUBLE)
    y, final = mixer.prefill(u)
    left, state = mixer.prefill(u[:, :cut])
    right, end = mixer.prefill(u[:, cut:], state)
    torch.testing.assert_close(torch.cat([left, right], 1), y)
    steps = []
    for t in range(cut, 21):
        one, state = mixer.step(u[:, t], state)
        steps.append(one)
    torch.testing.assert_close(torch.stack(steps, 1), y[:, cut:])
    for name, tensor in final.tensors().items():
        torch.testing.assert_close(end.tensors()[name], tensor)
        torch.testing.assert_close(state.tensors()[name], tensor)


@VARIANTS
def test_padding_on_both_sides(options):
    """Padded rows give what they give alone: outputs, state and the step after; rows of padding keep their state."""
    mixer, u = small(**options), torch.randn(3, 12, 16, **DOUBLE)
    _, before = mixer.prefill(torch.randn(3, 5, 16, **DOUBLE))
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, 4:], mask[1, 2:9] = True, True
    y, state = mixer.prefill(u, before, mask=mask)
    assert not y[~mask].any()
    for row, part in ((0, slice(4, 12)), (1, slice(2, 9))):
        alone, end = mixer.prefill(u[row : row + 1, part], before.select(torch.tensor([row])))
        torch.testing.assert_close(y[row, part], alone[0])
        for name, tensor in end.tensors().items():
            torch.testing.assert_close(state.tensors()[name][row], tensor[0])
    for name, tensor in before.tensors().items():
        torch.testing.assert_close(state.tensors()[name][2], tensor[2])


@VARIANTS
def test_packing_and_reset(options):
    mixer, u = small(**options), torch.randn(1, 12, 16, **DOUBLE)
    _, before = mixer.prefill(torch.randn(1, 5, 16, **DOUBLE))
    seq_idx = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2]])
    first, _ = mixer.prefill(u[:, :5], before)
    rest = [mixer.prefill(u[:, 5:6]), mixer.prefill(u[:, 6:])]
    y, state = mixer.prefill(u, before, seq_idx=seq_idx)
    torch.testing.assert_close(y, torch.cat([first, rest[0][0], rest[1][0]], 1))
    reset = seq_idx != seq_idx.roll(1, 1)
    reset[:, 0] = False
    same, end = mixer.prefill(u, before, reset=reset)
    torch.testing.assert_close(same, y)
    for name, tensor in rest[1][1].tensors().items():
        torch.testing.assert_close(state.tensors()[name], tensor)
        torch.testing.assert_close(end.tensors()[name], tensor)


@VARIANTS
def test_mixing_matrix(options):
    mixer, u = small(**options), torch.randn(2, 9, 16, **DOUBLE)
    plain = mixer.mixing_matrix(u)
    torch.testing.assert_close(plain.apply(), plain.outputs)
    _, state = mixer.prefill(torch.randn(2, 5, 16, **DOUBLE))
    going_on = mixer.mixing_matrix(u, state=state)
    torch.testing.assert_close(going_on.apply(), going_on.outputs)
    assert going_on.from_state.abs().max() > 1e-3
    length, r = 9, mixer.rank
    assert plain.matrix.shape == ((2, 8, length, length) if r == 1 else (2, 8, length, r, length, r))


def test_reduces_to_the_rule_of_mamba2():
    """lam = 1, theta = 0 and biases 0: `ssd` on normed B and C, with the decays of the data."""
    mixer, u = small(), torch.randn(2, 30, 16, **DOUBLE)
    u[..., -1] = 1  # an input that is always there, to make lam a constant
    with torch.no_grad():
        *_, lam, theta = mixer.in_proj.weight.split(mixer.splits)
        theta.zero_()
        lam.zero_()
        lam[:, -1] = 100
        mixer.B_bias.zero_()
        mixer.C_bias.zero_()
    z, x, B, C, dt, A, _, _ = mixer.in_proj(u).split(mixer.splits, dim=-1)
    B, C = mixer.B_norm(B)[:, :, None], mixer.C_norm(C)[:, :, None]
    dt = F.softplus(dt + mixer.dt_bias)
    y, ssm = ssd(x.unflatten(-1, (8, 4)), -heavy_tail(A) * dt, B, C, weight=dt, D=mixer.D)
    found, state = mixer.prefill(u)
    assert relative_error(found, mixer.out_proj(y.flatten(2) * F.silu(z))) < 1e-10
    assert relative_error(state.ssm, ssm) < 1e-10


def test_equal_ranks_are_one():
    """R equal ranks with 1 / R in mimo_x and mimo_o, open gates and R times D: the mixer with one rank."""
    one, many = small(rotation="half"), small(rank=3)
    copied = dict(one.named_parameters())
    with torch.no_grad():
        for name, parameter in many.named_parameters():
            if name in ("B_bias", "C_bias"):
                parameter.copy_(copied[name].expand_as(parameter))
            elif name == "in_proj.weight":
                parts = [*copied[name].split(one.splits)]
                parts[2], parts[3] = parts[2].repeat(3, 1), parts[3].repeat(3, 1)
                parameter.copy_(torch.cat(parts))
            elif name.startswith("mimo"):
                parameter.fill_(1 if name == "mimo_z" else 1 / 3)
            else:
                parameter.copy_(copied[name])
        many.D *= 3
    u = torch.randn(2, 20, 16, **DOUBLE)
    (y, state), (expected, end) = many.prefill(u), one.prefill(u)
    assert relative_error(y, expected) < 1e-10
    assert relative_error(state.ssm, end.ssm) < 1e-10


def test_heavy_tail():
    x = torch.tensor([-4, -1, -0.25, 0, 0.5, 3], requires_grad=True)
    assert heavy_tail(x).tolist() == pytest.approx([0.2, 0.5, 0.8, 1, 1.5, 4])
    wide = torch.tensor([-1e30, 1.0, 1e30], requires_grad=True)
    (gradient,) = torch.autograd.grad(heavy_tail(wide).sum(), wide)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("rank", "groups", "norm"), [(1, 1, False), (4, 2, True)])
def test_numbers_of_parameters_and_states(rank, groups, norm):
    d, inner, n, p, h, s = 32, 64, 12, 8, 8, 3
    mixer = Mamba3(d, d_state=n, headdim=p, rank=rank, ngroups=groups, outproj_norm=norm)
    expected = d * (2 * inner + 2 * rank * groups * n + 3 * h + s) + 2 * n + 2 * h * rank * n + 2 * h + inner * d
    expected += (3 * h * rank * p if rank > 1 else 0) + (inner if norm else 0)
    assert sum(parameter.numel() for parameter in mixer.parameters()) == expected
    assert mixer.state_numel() == h * p * n + h * s + rank * h * n + h * p
    state = mixer.init_state(5, dtype=torch.bfloat16)
    assert sum(tensor.numel() for tensor in state.tensors().values()) == 5 * mixer.state_numel()
    assert [tensor.dtype for tensor in state.tensors().values()] == [torch.float32] * 3 + [torch.bfloat16]


@pytest.mark.parametrize("rank", [1, 3])
def test_flops_are_those_of_the_products(rank):
    from omnissm.kernels.trapezoid_ssd.chunked import _outputs

    mixer = Mamba3(32, d_state=16, headdim=8, rank=rank, chunk_size=16, rope_fraction=0.0)
    scan = mixer._project(torch.randn(1, 48, 32))
    zeros, ranks = mixer.init_state(1), torch.ones(8, rank, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _outputs(*scan[:-1], zeros.ssm, zeros.phi, mixer.B_bias, mixer.C_bias, mixer.D, ranks, None, False, 16)
        mixer.out_proj(mixer.in_proj(torch.randn(1, 48, 32))[..., :64])
    assert mixer.flops(48) == counter.get_total_flops()
    assert mixer.flops(48, mode="train") == 3 * mixer.flops(48)


def test_state_keeps_float32_under_autocast():
    """4096 steps at dt = 1e-3: a state rounded to 16 bits would be half wrong."""
    torch.manual_seed(0)
    mixer = Mamba3(16, d_state=8, headdim=8, dt_min=1e-3, dt_max=1e-3)
    with torch.no_grad():
        mixer.in_proj.weight.copy_(mixer.in_proj.weight.bfloat16().float())
        mixer.in_proj.weight.split(mixer.splits)[4].zero_()  # no steps but the initial ones
    u = torch.randn(1, 4096, 16).bfloat16().float()
    exact = Mamba3(16, d_state=8, headdim=8, **DOUBLE)
    exact.load_state_dict(mixer.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, state = mixer.prefill(u)
        stepped = mixer.prefill(u[:, :4080])[1]
        for t in range(4080, 4096):
            _, stepped = mixer.step(u[:, t], stepped)
    with torch.no_grad():
        expected = exact.prefill(u.double())[1]
    assert relative_error(stepped.ssm, state.ssm) < 1e-3
    # What is left is the rounding of single inputs, not that of 4096 states.
    assert relative_error(state.ssm, expected.ssm) < 1e-3


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`rotation` must be 'interleaved', 'half' or None, got 'whole'"):
        Mamba3(16, headdim=4, rotation="whole")
    with pytest.raises(ValueError, match="`a_activation` must be 'heavy_tail' or 'softplus', got 'relu'"):
        Mamba3(16, headdim=4, a_activation="relu")
    with pytest.raises(ValueError, match="`rope_fraction` must lie in 0 to 1, got 2"):
        Mamba3(16, headdim=4, rope_fraction=2)
    mixer = small()
    with pytest.raises(TypeError, match="`state` must be a Mamba3State, got Tensor"):
        mixer.step(torch.randn(2, 16, **DOUBLE), torch.zeros(2))
    with pytest.raises(ValueError, match=r"`state.phi` must have shape \(2, 8, 2\), got \(3, 8, 2\)"):
        mixer.step(torch.randn(2, 16, **DOUBLE), mixer.init_state(3))
    assert isinstance(mixer.init_state(3).select(torch.tensor([0, 0])), Mamba3State)
