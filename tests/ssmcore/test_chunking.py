"""Dynamic chunking against loops, numbers worked out by formula, and itself under cuts, padding and packing."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).parent))
from tiny_chunking import Smoother

from omnissm.ssmcore import Stack
from omnissm.ssmcore.chunking import (
    Boundaries,
    FixedRouter,
    Hierarchy,
    RandomRouter,
    Router,
    Stage,
    chunk,
    chunk_stats,
    dechunk,
    ratio_loss,
    stage_multipliers,
    straight_through,
)
from omnissm.ssmcore.mixers.common import is_padding_behind, padding_behind

CLAMP = 1e-4

# Of `test_golden_numbers`, from scalar loops in numpy; the gradient from central differences of (1 + c - c0) u + r.
GOLDEN_COUNTS = [15, 5]
GOLDEN_LAST = [
    [-1.617338048781264, 2.2293211892752263, -1.685001810048068],
    [-0.9509473344883965, 1.5392584503442932, 1.7014897625870276],
]
GOLDEN_LOSS = 2.8148304542743103
GOLDEN_GRADIENT = 0.5656521251


def wave(*shape, phase=0.0):
    """sin(0.7 (k + 1 + phase)^2) along the flattened tensor: unruly numbers that any machine makes alike."""
    return torch.sin(0.7 * (torch.arange(math.prod(shape), dtype=torch.float64) + 1 + phase) ** 2).reshape(shape)


def given(mask, prob=None, real=None):
    """Boundaries as asked for."""
    mask = torch.tensor(mask, dtype=torch.bool)
    prob = torch.where(mask, 0.8, 0.3).double() if prob is None else torch.tensor(prob, dtype=torch.float64)
    return Boundaries(prob, mask, torch.where(mask, prob, 1 - prob), real)


def build(widths=(4, 6, 7), layout="padded", routers=None, seed=0):
    """Hierarchy of smoothers with every parameter set by a seeded draw, in float64."""
    torch.manual_seed(seed)
    routers = routers or [None] * (len(widths) - 1)
    stages = [
        Stage(width, Smoother(width, seed=s), Smoother(width, seed=10 + s), router)
        for s, (width, router) in enumerate(zip(widths[:-1], routers))
    ]
    net = Hierarchy(stages, Smoother(widths[-1], seed=20), d_innermost=widths[-1], layout=layout)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net.double()


# -- router


def test_router_is_the_formula():
    router = Router(3).double()
    for layer, phase in ((router.q_proj_layer, 0.1), (router.k_proj_layer, 0.7)):
        layer.weight.data = wave(3, 3, phase=phase)
    x = wave(2, 5, 3)
    found = router(x)
    for row in range(2):
        assert found.prob[row, 0] == 1
        for t in range(1, 5):
            q, k = router.q_proj_layer.weight @ x[row, t - 1], router.k_proj_layer.weight @ x[row, t]
            p = (1 - q @ k / (q.norm() * k.norm())) / 2
            torch.testing.assert_close(found.prob[row, t], p)
            assert found.mask[row, t] == (p > 0.5)
            torch.testing.assert_close(found.confidence[row, t], max(p, 1 - p))


def test_fresh_router_cuts_where_direction_changes():
    """Identity maps: equal neighbours give p = 0, orthogonal ones exactly 1/2, which is no boundary, opposite 1."""
    x = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, -3], [0, -1]])[None]
    found = Router(2)(x)
    assert found.prob.tolist() == [[1, 0, 0.5, 1, 0]]
    assert found.mask.tolist() == [[True, False, False, True, False]]
    assert found.confidence.tolist() == [[1, 1, 0.5, 1, 1]]


def test_router_stays_in_float32_under_autocast():
    x = torch.randn(1, 64, 16)
    router = Router(16)
    nn.init.normal_(router.q_proj_layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x)
        router.fp32 = False
        rounded = router(x)
    router.fp32 = True
    assert torch.equal(inside.prob, router(x).prob)
    assert rounded.prob.dtype == torch.float32
    assert 1e-4 < (rounded.prob - inside.prob).abs().max() < 0.05


@pytest.mark.parametrize(
    "router", [Router(4), FixedRouter(3, offset=2), RandomRouter(0.4)], ids=lambda r: type(r).__name__
)
def test_routers_are_exact_under_cuts_steps_and_padding(router):
    router = router.double()
    x = wave(2, 11, 4)
    whole = router(x)
    for cut in range(1, 11):
        left, state = router.prefill(x[:, :cut])
        right, end = router.prefill(x[:, cut:], state)
        assert torch.equal(torch.cat([left.mask, right.mask], 1), whole.mask)
        torch.testing.assert_close(torch.cat([left.prob, right.prob], 1), whole.prob)
    state = router.init_state(2, dtype=x.dtype)
    for t in range(11):
        found, state = router.step(x[:, t], state)
        assert torch.equal(found.mask, whole.mask[:, t])
    assert torch.equal(state.last, end.last)
    for pad in ((3, 0), (0, 2), (2, 1)):
        padded = F.pad(x, (0, 0, *pad), value=9.0)
        real = F.pad(torch.ones(2, 11, dtype=torch.bool), pad)
        found, state = router.prefill(padded, mask=real)
        assert torch.equal(found.mask[real], whole.mask.flatten())
        assert not found.mask[~real].any()
        assert torch.equal(state.last, end.last)


def test_routers_begin_anew_with_each_packed_sequence():
    x, numbers = wave(1, 9, 4), torch.tensor([[0, 0, 0, 0, 1, 1, 5, 5, 5]])
    for router in (Router(4).double(), FixedRouter(2), RandomRouter(0.5)):
        packed = router(x, seq_idx=numbers)
        parts = [router(part) for part in x.split([4, 2, 3], dim=1)]
        assert torch.equal(packed.mask, torch.cat([part.mask for part in parts], 1))
        torch.testing.assert_close(packed.prob, torch.cat([part.prob for part in parts], 1))


def test_fixed_and_random_rates():
    x = torch.zeros(2, 3000, 1)
    fixed = FixedRouter(3)(x)
    assert fixed.mask.float().mean() == pytest.approx(1 / 3)
    assert fixed.mask[0, :7].tolist() == [True, False, False, True, False, False, True]
    assert ratio_loss(fixed, 3) == pytest.approx(1.0)
    assert RandomRouter(0.25, seed=3)(x).mask.float().mean() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(RandomRouter(0.25, seed=3)(x).mask, RandomRouter(0.25, seed=4)(x).mask)
    with pytest.raises(ValueError, match="n=0"):
        FixedRouter(0)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        RandomRouter(1.5)


# -- chunk and dechunk


def test_chunk_keeps_order_and_counts():
    x = wave(3, 5, 2)
    boundaries = given([[1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    padded = chunk(x, boundaries)
    assert padded.counts.tolist() == [3, 1, 5]
    assert padded.max_count == 5
    assert padded.mask.sum(1).tolist() == [3, 1, 5]
    torch.testing.assert_close(padded.x[0, :3], x[0, [0, 2, 3]])
    flat = chunk(x, boundaries, layout="flat")
    assert flat.x.shape == (1, 9, 2)
    assert flat.seq_idx.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 2]]
    torch.testing.assert_close(flat.x[0], padded.x[padded.mask])
    assert chunk(x[:1], given([[1, 0, 1, 1, 0]])).mask is None
    with pytest.raises(ValueError, match="'padded' or 'flat', got 'ragged'"):
        chunk(x, boundaries, layout="ragged")


def test_dechunk_by_hand():
    """P = 0.8 and z = 1, 2: 0.8, then 0.2 * 0.8 + 0.8 * 2 = 1.76; a certain boundary keeps 0.9999 of its vector."""
    boundaries = given([[1, 0, 1, 0], [1, 0, 0, 0]], prob=[[0.8, 0.1, 0.8, 0.2], [1.0, 0.2, 0.2, 0.2]])
    z = torch.tensor([[[1.0], [2.0]], [[3.0], [9.0]]], dtype=torch.float64)
    u, last = dechunk(z, boundaries, chunk(wave(2, 4, 1), boundaries))
    expected = torch.tensor([[0.8, 0.8, 1.76, 1.76], [2.9997] * 4], dtype=torch.float64)
    torch.testing.assert_close(u[..., 0], expected)
    torch.testing.assert_close(last[:, 0], expected[:, -1])


@pytest.mark.parametrize(
    "mask",
    [[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1]],
    ids=["one chunk", "a chunk per position", "no boundary", "late"],
)
def test_dechunk_is_the_loop(mask):
    boundaries = given([mask], prob=[[0.99999 if m and t % 2 else 0.7 if m else 1e-6 for t, m in enumerate(mask)]])
    state = wave(1, 3, phase=2)
    z = wave(1, sum(mask), 3)
    h, k, loop = state[0], 0, []
    for t, m in enumerate(mask):
        if m:
            p = boundaries.prob[0, t].clamp(CLAMP, 1 - CLAMP)
            h, k = (1 - p) * h + p * z[0, k], k + 1
        loop.append(h)
    u, last = dechunk(z, boundaries, chunk(wave(1, 6, 3), boundaries), state)
    torch.testing.assert_close(u[0], torch.stack(loop))
    torch.testing.assert_close(last[0], loop[-1])


def test_dechunk_gradients():
    """dz_j = P_j A_j and dP_j = A_j . (z_j - h_{j-1}), with A_j the decayed sum of what reaches chunk j."""
    mask = torch.tensor([[1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    prob = torch.tensor([[0.9, 0.2, 0.6, 0.75, 0.1, 0.3]], dtype=torch.float64, requires_grad=True)
    z, g = wave(1, 3, 2).requires_grad_(), wave(1, 6, 2, phase=1)
    boundaries = Boundaries(prob, mask, prob)
    chunks = chunk(wave(1, 6, 2), boundaries)
    (dechunk(z, boundaries, chunks)[0] * g).sum().backward()
    a = torch.stack([g[0, :2].sum(0), g[0, 2], g[0, 3:].sum(0)])
    P = prob.detach()[0, [0, 2, 3]]
    h, A = [torch.zeros(2, dtype=torch.float64)], torch.zeros(3, 2, dtype=torch.float64)
    for j in range(3):
        h.append((1 - P[j]) * h[-1] + P[j] * z.detach()[0, j])
    for j in (2, 1, 0):
        A[j] = a[j] + ((1 - P[j + 1]) * A[j + 1] if j < 2 else 0)
    torch.testing.assert_close(z.grad[0], P[:, None] * A)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[[0, 2, 3]] = torch.stack([A[j] @ (z.detach()[0, j] - h[j]) for j in range(3)])
    torch.testing.assert_close(prob.grad[0], expected)


def test_straight_through_is_one_with_a_gradient():
    c = torch.tensor([0.5, 0.7, 1.0], requires_grad=True)
    y = straight_through(c)
    assert y.tolist() == [1, 1, 1]
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert c.grad.tolist() == [1, 2, 3]


def test_dechunk_refuses_a_state_in_the_flat_layout():
    boundaries = given([[1, 0]])
    with pytest.raises(ValueError, match="layout='padded'"):
        dechunk(wave(1, 1, 2), boundaries, chunk(wave(1, 2, 2), boundaries, layout="flat"), torch.zeros(1, 2))


# -- ratio loss


@pytest.mark.parametrize("target", [2, 3, 6.5])
def test_ratio_loss_is_one_at_the_target_and_pushes_towards_it(target):
    count = 1300
    for rate, sign in ((1 / target, 0), (0.9, 1), (0.05, -1)):
        mask = torch.arange(count) < round(rate * count)
        prob = torch.full((1, count), mask.double().mean().item(), dtype=torch.float64, requires_grad=True)
        loss = ratio_loss(Boundaries(prob, mask[None], prob), target)
        loss.backward()
        slope = prob.grad.sum()
        rate = mask.double().mean()
        torch.testing.assert_close(slope, target / (target - 1) * (target * rate - 1))
        if sign == 0:
            assert loss.item() == pytest.approx(1, abs=1e-4)
        else:
            assert loss > 1
            assert slope.sign() == sign
    with pytest.raises(ValueError, match="above 1, got 1"):
        ratio_loss(Boundaries(prob, mask[None], prob), 1)


def test_statistics_leave_padding_out():
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    padded = given([[1, 0, 0, 1], [1, 0, 0, 0]], real=real)
    packed = given([[1, 0, 0, 1, 1, 0]])
    assert ratio_loss(padded, 3) == ratio_loss(packed, 3)
    stats = chunk_stats([padded, given([[1, 1, 0]])])
    assert stats["stage0/rate"] == pytest.approx(0.5)
    assert stats["stage0/chunk_length"] == pytest.approx(2)
    assert stats["stage0/prob"] == pytest.approx((3 * 0.8 + 3 * 0.3) / 6)
    assert stats["chunk_length"] == pytest.approx(2 * 1.5)


# -- hierarchy


def test_one_stage_is_the_formula():
    net = build((4, 4))
    x = wave(1, 7, 4)
    e = net.encoder(x)
    b = net.routing_module(e)
    z = net.main_network.main_network(e[:, b.mask[0]])
    h, k, rows = torch.zeros(4, dtype=torch.float64), 0, []
    for t in range(7):
        if b.mask[0, t]:
            p = b.prob[0, t].clamp(CLAMP, 1 - CLAMP)
            h, k = (1 - p) * h + p * z[0, k], k + 1
        rows.append(h + net.residual_proj(e[0, t]))
    y, found = net(x)
    torch.testing.assert_close(y, net.decoder(torch.stack(rows)[None]))
    assert 1 < k < 7
    assert torch.equal(found[0].mask, b.mask)


def test_golden_numbers():
    """Every weight and input follows `wave`."""
    net = build((3, 4, 4))
    for phase, parameter in enumerate(net.parameters()):
        parameter.data = wave(*parameter.shape, phase=phase)
    x = wave(2, 9, 3, phase=0.5)
    y, found = net(x)
    assert [b.mask.sum().item() for b in found] == GOLDEN_COUNTS
    torch.testing.assert_close(y[:, -1], torch.tensor(GOLDEN_LAST, dtype=torch.float64), atol=1e-8, rtol=0)
    loss = y.square().mean() + 0.1 * sum(ratio_loss(b, n) for b, n in zip(found, (3, 2)))
    assert loss.item() == pytest.approx(GOLDEN_LOSS, abs=1e-8)
    loss.backward()
    assert net.routing_module.q_proj_layer.weight.grad.norm().item() == pytest.approx(GOLDEN_GRADIENT, abs=1e-8)


@pytest.mark.parametrize("lengths", [(9, 9), (9, 4), (1, 6)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_packed_rows_and_layouts_equal_single_sequences(lengths, side):
    net, flat = build(), build(layout="flat")
    sequences = [wave(1, n, 4, phase=n + k) for k, n in enumerate(lengths)]
    alone = [net(x) for x in sequences]
    most = max(lengths)
    pads = [(most - n, 0) if side == "left" else (0, most - n) for n in lengths]
    x = torch.cat([F.pad(x, (0, 0, *pad), value=5.0) for x, pad in zip(sequences, pads)])
    real = torch.cat([F.pad(torch.ones(1, n, dtype=torch.bool), pad) for n, pad in zip(lengths, pads)])
    for model in (net, flat):
        y, found = model(x, mask=real)
        torch.testing.assert_close(y[real], torch.cat([out[0] for out, _ in alone]))
        assert not y[~real].any()
        y, packed = model(
            torch.cat(sequences, 1), seq_idx=torch.arange(2).repeat_interleave(torch.tensor(lengths))[None]
        )
        torch.testing.assert_close(y[0], torch.cat([out[0] for out, _ in alone]))
        for s in range(2):
            expected = torch.cat([b[s].mask[0] for _, b in alone])
            assert torch.equal(
                packed[s].mask[0] if packed[s].real is None else packed[s].mask[packed[s].real], expected
            )
            torch.testing.assert_close(ratio_loss(found[s], 3), ratio_loss(packed[s], 3))


@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_packed_rows_of_a_padded_batch_equal_single_sequences(layout):
    net = build(layout=layout)
    rows = [[5, 4], [7, 1, 3], [2]]
    sequences = [[wave(1, n, 4, phase=n + 3 * r) for n in row] for r, row in enumerate(rows)]
    alone = [torch.cat([net(x)[0] for x in row], 1) for row in sequences]
    x = torch.cat([F.pad(torch.cat(row, 1), (0, 0, 0, 11 - sum(n)), value=7.0) for row, n in zip(sequences, rows)])
    numbers = torch.tensor([[0] * 5 + [1] * 6, [0] * 7 + [1] + [2] * 3, [4] * 11])
    real = torch.arange(11) < torch.tensor([[sum(row)] for row in rows])
    y, found = net(x, mask=real, seq_idx=numbers)
    torch.testing.assert_close(y[real], torch.cat([part[0] for part in alone]))
    single = [net(x)[1] for row in sequences for x in row]
    for s in range(2):
        counts = sum(b[s].mask.sum() for b in single)
        assert found[s].mask.sum() == counts


@pytest.mark.parametrize("sizes", [[1] * 12, [7, 5], [5, 1, 6], [12], [11, 1]], ids=str)
def test_any_cut_is_exact(sizes):
    net = build()
    x = wave(3, 12, 4)
    whole, _ = net(x)
    _, end, _ = net.prefill(x)
    state, parts = None, []
    for part in x.split(sizes, dim=1):
        y, state, _ = net.prefill(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    for a, b in itertools.zip_longest(torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(end)):
        torch.testing.assert_close(a, b)


def test_padded_pieces_continue_each_row_where_it_stands():
    """Rows of 5, 3 and 0 new positions, padded on both sides, continue like single rows."""
    net = build()
    x = wave(3, 8, 4)
    _, state, _ = net.prefill(x)
    more = wave(3, 5, 4, phase=3)
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    y, after, _ = net.prefill(more, state, mask=real)
    for row in range(2):
        alone, end, _ = net.prefill(more[row : row + 1, real[row]], state.select(torch.tensor([row])))
        torch.testing.assert_close(y[row][real[row]], alone[0])
        for a, b in zip(_leaves(after.select(torch.tensor([row]))), _leaves(end)):
            torch.testing.assert_close(a, b)
    for a, b in zip(_leaves(after.select(torch.tensor([2]))), _leaves(state.select(torch.tensor([2])))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("front", [0, 1])
def test_without_the_state_after_padding_costs_the_stacks_nothing(front, monkeypatch):
    """The same values at real positions; stacks that cannot see padding behind are not told of it."""
    torch.manual_seed(0)
    options = {"mlp_hidden": 8, "mixer_options": {"mamba2": {"headdim": 4, "d_state": 4}, "attention": {"window": 3}}}
    stages = [Stage(8, Stack(8, "m1t1", **options), Stack(8, "t1m1", **options)) for _ in range(2)]
    net = Hierarchy(stages, Stack(8, "T1", **options)).double()
    _, state, _ = net.prefill(wave(3, 9, 8))
    x, counts = wave(3, 7, 8, phase=5), torch.tensor([7, 4, 0])
    real = (torch.arange(7) >= front) & (torch.arange(7) < counts[:, None])
    y, _, found = net.prefill(x, state, mask=real)
    masks = []
    prefill = Stack.prefill
    monkeypatch.setattr(Stack, "prefill", lambda *a, mask=None, **k: masks.append(mask) or prefill(*a, mask=mask, **k))
    alone, none, again = net.prefill(x, state, mask=real, with_state=False)
    assert none is None
    assert {mask is None for mask in masks} == {front == 0}
    torch.testing.assert_close(alone[real], y[real])
    for a, b in zip(again, found):
        assert torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[1, 0, 1]], [[0, 1, 1]], [[0, 0, 0]], [[1]]], ids=str)
def test_padding_behind_is_known_or_found(mask):
    mask = torch.tensor(mask, dtype=torch.bool)
    behind = bool((mask.sum(1, keepdim=True) > torch.arange(mask.shape[1])).eq(mask).all())
    assert is_padding_behind(mask) == behind
    made = padding_behind(mask.sum(1), mask.shape[1])
    assert is_padding_behind(made)
    assert torch.equal(made, mask) == behind


@pytest.mark.parametrize("routers", [None, [FixedRouter(3), None], [RandomRouter(0.4), FixedRouter(2)]], ids=str)
@pytest.mark.parametrize("how", ["seq_idx", "reset", "both"])
def test_a_state_continues_the_first_packed_sequence_alone(how, routers):
    """Also where that one begins no chunk of its own here, so that the first chunk is of the next sequence."""
    net = build(routers=routers)
    _, state, _ = net.prefill(wave(4, 5, 4))
    x = wave(4, 9, 4, phase=5)
    begins = torch.zeros(4, 9, dtype=torch.bool)
    begins[0, 1] = begins[1, [2, 3, 7]] = begins[3, 0] = True
    seq_idx = begins.cumsum(1) if how != "reset" else None
    reset = begins if how != "seq_idx" else None
    y, after, _ = net.prefill(x, state, seq_idx=seq_idx, reset=reset)
    for row in range(4):
        begin, parts, start = state.select(torch.tensor([row])), [], 0
        if begins[row, 0] and reset is not None:
            begin = None
        for end in [*begins[row, 1:].nonzero()[:, 0].add(1).tolist(), 9]:
            part, begin, _ = net.prefill(x[row : row + 1, start:end], begin)
            parts.append(part)
            start, last, begin = end, begin, None
        torch.testing.assert_close(y[row : row + 1], torch.cat(parts, 1))
        own = after.select(torch.tensor([row]))
        more = wave(1, 6, 4, phase=9)
        torch.testing.assert_close(net.prefill(more, own)[0], net.prefill(more, last)[0])


def test_no_positions_and_wrong_states():
    net = build()
    x = wave(2, 6, 4)
    _, state, _ = net.prefill(x)
    none = torch.ones(2, 0, dtype=torch.bool)
    for given in ({}, {"mask": none}, {"reset": none, "seq_idx": none.int()}):
        y, after, _ = net.prefill(x[:, :0], state, **given)
        assert y.shape == (2, 0, 4)
        for a, b in zip(_leaves(after), _leaves(state)):
            assert torch.equal(a, b)
    assert net(x[:, :0])[0].shape == (2, 0, 4)
    assert net(x[:0])[0].shape == (0, 6, 4)
    for call in (lambda: net.prefill(x, state.inner.encoder), lambda: net.step(x[:, 0], None)):
        with pytest.raises(TypeError, match="`state` must be a HierarchyState"):
            call()


def test_states_of_routers_without_parameters_lie_with_the_model():
    state = build((4, 4), routers=[FixedRouter(3)]).to("meta").init_state(2)
    assert {leaf.device.type for leaf in _leaves(state.router)} == {"meta"}


@pytest.mark.parametrize("dense", [False, True])
def test_step_equals_forward_with_rows_that_cut_at_different_places(dense):
    net = build()
    x = wave(3, 14, 4)
    whole, found = net(x)
    assert 0 < found[0].mask.all(0).sum() < found[0].mask.any(0).sum() < 14  # all three ways of a step are taken
    state = net.init_state(3, dtype=x.dtype)
    for t in range(14):
        y, state, stepped = net.step(x[:, t], state, dense=dense)
        torch.testing.assert_close(y, whole[:, t])
        assert torch.equal(stepped[0].mask, found[0].mask[:, t])
    assert state.count.tolist() == found[0].mask.sum(1).tolist()
    assert state.batch_size == 3
    assert state.nbytes > 0


def test_nothing_depends_on_what_comes_later():
    net = build()
    x = wave(1, 10, 4).requires_grad_()
    for t in (0, 4, 8):
        (dx,) = torch.autograd.grad(net(x)[0][:, : t + 1].sum(), x)
        assert not dx[:, t + 1 :].any()
        assert dx[:, t].any()
    changed = x.detach().clone()
    changed[:, 6] += 1
    for a, b in zip(net(x)[1][0].mask[0, :6], net(changed)[1][0].mask[0, :6]):
        assert a == b


def test_gradient_reaches_every_parameter():
    net = build()
    y, found = net(wave(2, 12, 4))
    (y.square().mean() + 0.1 * sum(ratio_loss(b, 2) for b in found)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradient_is_that_of_the_join_with_free_confidence(monkeypatch):
    """The straight-through gradient is the true one of (1 + c - c0) u + r at c = c0, while no boundary moves."""
    net = build((3, 4, 4))
    x, direction, weights = wave(1, 10, 3), wave(1, 10, 3, phase=2), wave(1, 10, 3, phase=4)
    kept = []
    module = sys.modules["omnissm.ssmcore.chunking.hierarchy"]
    x.requires_grad_()
    (dx,) = torch.autograd.grad((net(x)[0] * weights).sum(), x)

    monkeypatch.setattr(module, "straight_through", lambda c: kept.append(c.detach()) or straight_through(c))
    with torch.enable_grad():  # without gradients the factor is left out
        _, found = net(x)
        values = []
        for h in (1e-6, -1e-6):
            constants = iter(kept[:2])
            monkeypatch.setattr(module, "straight_through", lambda c, order=constants: 1 + c - next(order))
            y, moved = net(x + h * direction)
            assert all(torch.equal(a.mask, b.mask) for a, b in zip(found, moved))
            values.append((y * weights).sum())
    assert ((values[0] - values[1]) / 2e-6).item() == pytest.approx((dx * direction).sum().item(), rel=1e-6)


def test_widths_and_stages():
    net = build((3, 5, 8))
    assert net.widths == [3, 5, 8]
    assert [level.d_outer for level in net.levels()] == [3, 3, 5]
    assert net.pad_dimension is None
    assert net.main_network.pad_dimension.shape == (2,)
    plain = Hierarchy([], Smoother(4), d_innermost=4).double()
    y, found = plain(wave(1, 3, 4))
    assert found == []
    torch.testing.assert_close(y, plain.main_network(wave(1, 3, 4)))
    with pytest.raises(ValueError, match="got 5 around 3"):
        build((5, 3))
    with pytest.raises(ValueError, match="d_innermost"):
        Hierarchy([], Smoother(4))


def test_other_routers_fit_in():
    net = build((4, 4), routers=[FixedRouter(3)])
    y, found = net(wave(2, 9, 4))
    assert found[0].mask.sum().item() == 6
    assert ratio_loss(found[0], 3).item() == pytest.approx(1)
    assert y.isfinite().all()


def test_learning_rates_of_stages():
    assert stage_multipliers([8, 8, 8], [3, 2]) == pytest.approx([6**0.5, 2**0.5, 1])
    assert stage_multipliers([256, 512], [3], reference=4.6) == pytest.approx([(4.6 * 2) ** 0.5, (4.6 / 3) ** 0.5])
    with pytest.raises(ValueError, match="1 targets need 2 widths, got 3"):
        stage_multipliers([8, 8, 8], [3])


def _leaves(state):
    return torch.utils._pytree.tree_leaves(state)
