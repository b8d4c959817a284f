"""Chimera2D: its switches, and the models it must reduce to."""

import copy

import pytest
import torch
import torch.nn.functional as F

from omnissm.kernels import linear_scan, use_backend
from omnissm.ssmcore import Chimera2D
from omnissm.ssmcore.testing import GRID_CHECKS, grid_input
from omnissm.ssmcore.training.optim import param_groups

SWITCHES = [
    {},
    {"coupling": "none"},
    {"coupling": "time_to_variate"},
    {"coupling": "variate_to_time"},
    {"coupling": "pooled"},
    {"coupling": "pooled", "selective": False, "input_discretization": "zoh"},
    {"coupling": "pooled", "seasonal_input": "residual"},
    {"bidirectional": False},
    {"gate": False},
    {"selective": False},
    {"mix_variates": False},
    {"d_conv": 0},
    {"heads": ("trend",)},
    {"heads": ["seasonal"]},
    {"seasonal_input": "residual"},
    {"seasonal_input": "residual", "heads": ("seasonal", "trend")},
    {"seasonal_input": "moving_average", "moving_average": 3},
    {"input_discretization": "zoh"},
    {"selective": False, "mix_variates": False, "gate": False, "d_conv": 0},
]


def build(**options):
    torch.manual_seed(0)
    return Chimera2D(8, **{"d_state": 3, **options})


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_every_switch_keeps_the_contract(options, device):
    mixer = build(**options, device=device)
    for check in GRID_CHECKS:
        check(mixer)


@pytest.mark.parametrize("options", SWITCHES[1:], ids=str)
def test_every_switch_changes_the_output(options):
    plain, changed = build(), build(**options)
    shared = {name: value for name, value in plain.state_dict().items() if name in changed.state_dict()}
    changed.load_state_dict({n: v for n, v in shared.items() if v.shape == changed.state_dict()[n].shape}, strict=False)
    x = grid_input(plain)
    assert not torch.allclose(plain(x), changed(x), atol=1e-4)


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_fast_path_equals_reference(options):
    mixer = build(**options).double()
    x = grid_input(mixer).requires_grad_()
    gap = torch.tensor([[1.0, 1.0, 4.0, 1.0, 2.0, 1.0]]).expand(2, -1).double()
    results = []
    for backend in ("chunked", "reference"):
        with use_backend(backend):
            y = mixer(x, time_gap=gap)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


def test_without_mixing_every_variate_is_on_its_own():
    mixer = build(mix_variates=False)
    x = grid_input(mixer).requires_grad_()
    (dx,) = torch.autograd.grad(mixer(x)[:, 1].sum(), x)
    assert dx[:, 1].any()
    assert not dx[:, [0, 2]].any()
    torch.testing.assert_close(mixer(x)[:, 2:], mixer(x[:, 2:]))


def test_without_mixing_a_head_is_a_selective_scan():
    mixer = build(mix_variates=False, heads=("trend",), gate=False, d_conv=0).double()
    x = grid_input(mixer)
    z = F.silu(mixer.in_proj(x)).flatten(0, 1)  # (b i, j, d)
    low, B, C = (z @ mixer.x_proj[0]).split([mixer.dt_rank, 3, 3], dim=-1)
    dt = F.softplus(low @ mixer.dt_proj[0, 0] + mixer.dt1_bias[0])[..., None]
    a = torch.exp(-dt * mixer.A1_log[0].exp())
    h, _ = linear_scan(a.flatten(2), (dt * B[:, :, None] * z[..., None]).flatten(2))
    y = (h.view_as(a) * C[:, :, None]).sum(-1) + mixer.D[0] * z
    torch.testing.assert_close(mixer(x), mixer.out_proj(y).unflatten(0, x.shape[:2]))


def test_both_directions_commute_with_reversal_of_the_variates():
    mixer = build().double()
    mirrored = build().double()
    with torch.no_grad():  # exchange the parameters of the two directions of each head
        for name, parameter in mixer.named_parameters():
            if name in ("in_proj.weight", "out_proj.weight", "conv_weight", "conv_bias"):
                continue
            dim = 1 if name == "dt_proj" else 0
            order = torch.tensor([1, 0, 3, 2])
            mirrored.get_parameter(name).copy_(parameter.index_select(dim, order))
    x = grid_input(mixer)
    torch.testing.assert_close(mirrored(x.flip(1)), mixer(x).flip(1))


def test_one_direction_looks_up_only():
    mixer = build(bidirectional=False)
    x = grid_input(mixer).requires_grad_()
    (dx,) = torch.autograd.grad(mixer(x)[:, 1].sum(), x)
    assert dx[:, 0].any()
    assert not dx[:, 2].any()


def test_moving_average_leaves_out_what_is_masked():
    mixer = build(seasonal_input="moving_average", moving_average=3)
    mask = torch.tensor([True, True, False, False, True, True]).expand(1, 1, 6)
    z = mask[..., None] * torch.ones(1, 1, 6, 2 * mixer.d_model)
    trend, seasonal = mixer._decomposed(z, mask).chunk(2, dim=-1)
    torch.testing.assert_close(trend, z[..., : mixer.d_model])
    torch.testing.assert_close(seasonal, torch.zeros_like(seasonal))


def test_moving_average_splits_the_input():
    mixer = build(seasonal_input="moving_average", moving_average=3)
    z = torch.randn(2, 3, 7, 16)
    parts = mixer._decomposed(z, None)
    trend = torch.stack([z[:, :, max(0, j - 2) : j + 1, :8].mean(2) for j in range(7)], dim=2)
    torch.testing.assert_close(parts[..., :8], trend)
    own = torch.stack([z[:, :, max(0, j - 2) : j + 1, 8:].mean(2) for j in range(7)], dim=2)
    torch.testing.assert_close(parts[..., 8:], z[..., 8:] - own)


def test_steps_start_in_their_ranges():
    mixer = Chimera2D(64, trend_dt=(2e-3, 5e-2), seasonal_dt=[0.2, 0.8], variate_dt=(0.3, 0.4))
    steps = mixer.dt_ranges()
    for head, (low, high) in {"trend": (2e-3, 5e-2), "seasonal": (0.2, 0.8)}.items():
        assert steps[head].shape == (128,)
        assert low * 0.999 <= steps[head].min() < steps[head].max() <= high * 1.001
    across = F.softplus(mixer.dt2_bias)
    assert 0.3 * 0.999 <= across.min() < across.max() <= 0.4 * 1.001


def test_a_missing_token_is_free_evolution():
    """A column without observation leaves no trace but the decay: two short steps instead of one."""
    mixer = build(selective=False, coupling="none", d_conv=0, gate=False, d_state=1, bidirectional=False).double()
    x = grid_input(mixer)
    mask = torch.ones(x.shape[:3], dtype=torch.bool)
    mask[:, :, 3] = False
    with_hole = mixer(x, mask=mask)[:, :, 4]
    gap = torch.ones(2, 5, dtype=torch.float64)
    gap[:, 3] = 2
    shorter = x[:, :, [0, 1, 2, 4, 5]]
    torch.testing.assert_close(with_hole, mixer(shorter, time_gap=gap)[:, :, 3])


def test_marks_and_names():
    mixer = build()
    names = set(mixer.no_decay_names())
    assert {"A1_log", "A4_log", "theta2", "theta3", "dt1_bias", "dt2_bias", "D"} <= names
    for name, parameter in mixer.named_parameters():
        assert getattr(parameter, "_no_weight_decay", False) == (name in names)
    assert "theta2" not in build(coupling="none").no_decay_names()


def test_optimiser_groups_after_a_copy():
    mixer = copy.deepcopy(build())  # a copy has lost the marks, not the declarations
    decayed, kept = param_groups(mixer, 0.1)
    names = {id(parameter): name for name, parameter in mixer.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "in_proj.weight", "out_proj.weight", "conv_weight", "x_proj", "dt_proj",
    }  # fmt: skip
    assert {names[id(p)] for p in kept["params"]} == set(mixer.no_decay_names())
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_compiles_whole():
    mixer = build()
    x = grid_input(mixer)
    mask, gap = torch.rand(x.shape[:3]) > 0.2, 1 + torch.rand(x.shape[0], x.shape[2])
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=mask, time_gap=gap), mixer(x, mask=mask, time_gap=gap))


def test_trains_under_autocast():
    mixer = build()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixer(grid_input(mixer)).float().square().mean()
    gradients = torch.autograd.grad(loss, list(mixer.parameters()))
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


def test_parameter_count():
    d, n, rank, groups = 32, 4, 2, 4
    scans = groups * (d * 2 * (rank + 2 * n) + 2 * rank * d + 2 * d + 4 * d * n + d)
    assert sum(p.numel() for p in Chimera2D(d, d_state=n).parameters()) == 3 * d * d + 2 * d * 4 + scans + d * d


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "both"}, "`coupling` must be one of 'full', 'none', 'time_to_variate', 'variate_to_time'"),
        ({"seasonal_input": "fft"}, "`seasonal_input` must be one of 'parallel', 'residual', 'moving_average'"),
        (
            {"heads": ("trend", "noise")},
            r"must name one or both of 'trend', 'seasonal', got \('trend', 'noise'\)",
        ),
        ({"heads": ()}, "`heads` must name one or both"),
        ({"heads": ("trend",), "seasonal_input": "residual"}, "needs both heads"),
        ({"input_discretization": "tustin"}, "`input_discretization` must be one of 'euler', 'zoh'"),
        ({"d_conv": 9}, "`d_conv` must lie in 0"),
        ({"d_state": 0}, "`d_state` must be at least 1"),
        ({"kappa": 1.2}, r"`kappa` must lie in \[0, 1\]"),
        ({"trend_dt": (0.1, 0.01)}, "`trend_dt` must be"),
    ],
    ids=str,
)
def test_unknown_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Chimera2D(8, **options)


def test_a_word_is_no_switch():
    with pytest.raises(TypeError, match="`mix_variates` must be True or False, got 'false'"):
        Chimera2D(8, mix_variates="false")


def test_wrong_shapes_are_refused():
    mixer = build()
    with pytest.raises(ValueError, match=r"`x` must be \(b, i, j, 8\), got shape \(2, 3, 8\)"):
        mixer(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="`mask` must be"):
        mixer(torch.zeros(2, 3, 4, 8), mask=torch.ones(2, 4, 3, dtype=torch.bool))


def test_whole_model_in_bfloat16():
    mixer = build().bfloat16()
    y = mixer(grid_input(mixer))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


def test_learns_a_lag_across_variates():
    """Variate 1 repeats what variate 0 did two tokens before: with mixing this is learned, without it cannot be."""
    losses = {}
    for mixing in (True, False):
        torch.manual_seed(0)
        mixer = Chimera2D(16, d_state=4, mix_variates=mixing)
        model = torch.nn.Sequential(torch.nn.Linear(1, 16), mixer, torch.nn.Linear(16, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(90):
            source = torch.randn(32, 1, 8, 1)
            target = torch.cat([torch.zeros(32, 1, 2, 1), source[:, :, :-2]], dim=2)
            x = torch.cat([source, torch.zeros_like(source)], dim=1)
            loss = F.mse_loss(model(x)[:, 1, 2:], target[:, 0, 2:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[mixing] = loss.item()
    assert losses[True] < 0.2
    assert losses[False] > 0.8


def test_pooled_coupling_is_the_recurrence_and_knows_no_order():
    mixer = build(coupling="pooled").double()
    z, gap = torch.randn(2, 3, 5, 6, 8).double(), torch.rand(3, 6).double() + 0.5
    with torch.no_grad():
        mixer.theta2.mul_(20)
        y = mixer._pooled_scan(z, z, slice(0, 2), None, gap)
        dt = mixer._coefficients(z.mean(2, keepdim=True), slice(0, 2))[0][0].unflatten(0, (2, 3))[..., None]
        B, C = (t.unflatten(0, (2, 3))[..., None, :] for t in mixer._coefficients(z, slice(0, 2))[0][1:])
        alpha = mixer.A1_log[:, None, None].exp()
        h = torch.zeros(2, 3, 5, 8, 3).double()
        for j in range(6):
            p = torch.exp(-dt[:, :, :, j] * gap[None, :, j, None, None, None] * alpha)
            q = mixer.kappa * torch.tanh(mixer.theta2[:, None, None]) * (1 - p)
            h = p * h + q * h.mean(2, keepdim=True) + dt[:, :, :, j] * B[:, :, :, j] * z[:, :, :, j, :, None]
            expected = (C[:, :, :, j] * h).sum(-1) + mixer.D[:, None, None] * z[:, :, :, j]
            torch.testing.assert_close(y[:, :, :, j], expected, rtol=1e-10, atol=1e-10)
    x, order = torch.randn(2, 5, 6, 8).double(), torch.randperm(5)
    torch.testing.assert_close(mixer(x[:, order]), mixer(x)[:, order], rtol=1e-10, atol=1e-10)
    assert (mixer(x)[:, :1] - mixer(x[:, :1])).abs().max() > 1e-6  # and yet variates see each other
