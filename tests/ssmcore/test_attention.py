"""Attention against its formula, and its state against whole sequences, for every option."""

import itertools
import math

import pytest
import torch

from omnissm.ssmcore.mixers.attention import Attention, AttentionState, FixedAttentionState
from omnissm.ssmcore.mixers.common import Layout

DOUBLE = {"dtype": torch.float64}
CAUSAL = {
    "plain": {},
    "grouped": {"nheads": 4, "kv_heads": 2},
    "one key head": {"nheads": 4, "kv_heads": 1, "headdim": 6, "qkv_bias": True, "out_bias": True},
    "rotary": {"nheads": 2, "rotary_dim": 4},
    "interleaved": {"nheads": 2, "rotary_dim": 2, "rotation": "interleaved"},
    "window": {"nheads": 2, "window": 3, "rotary_dim": 4},
    "window of itself": {"nheads": 2, "window": 0},
    "convolution": {"nheads": 2, "d_conv": 4, "rotary_dim": 4},
    "convolution and window": {"nheads": 2, "d_conv": 3, "window": 4},
    "mlp": {"nheads": 2, "mlp_dim": 10},
    "all": {"nheads": 4, "kv_heads": 2, "rotary_dim": 2, "window": 5, "d_conv": 4, "mlp_dim": 6, "qkv_bias": True},
}


def build(**options):
    torch.manual_seed(0)
    return Attention(8, **DOUBLE, **options)


def by_loops(mixer, x, position=None):
    """Every head, query and key in turn; no convolution."""
    batch, length, _ = x.shape
    qkv, mlp = mixer.in_proj(x).split([mixer.qkv_dim, mixer.mlp_dim], -1)
    heads = qkv.unflatten(-1, (-1, mixer.headdim))
    y = torch.zeros(batch, length, mixer.nheads, mixer.headdim, **DOUBLE)

    def turned(vector, place):
        vector, half = vector.clone(), mixer.rotary_dim // 2
        for pair in range(half):
            i, j = (pair, pair + half) if mixer.rotation == "half" else (2 * pair, 2 * pair + 1)
            angle = place * mixer.rotary_base ** (-pair / half)
            a, b = vector[i].clone(), vector[j].clone()
            vector[i] = a * math.cos(angle) - b * math.sin(angle)
            vector[j] = a * math.sin(angle) + b * math.cos(angle)
        return vector

    left, right = mixer.window
    for b, h, t in itertools.product(range(batch), range(mixer.nheads), range(length)):
        group = h // (mixer.nheads // mixer.kv_heads)
        seen = [s for s in range(length) if (left is None or s >= t - left) and (right is None or s <= t + right)]
        q = turned(heads[b, t, h], t)
        k = [turned(heads[b, s, mixer.nheads + group], s) for s in seen]
        scores = torch.stack([q @ key for key in k]) * mixer.scale
        values = heads[b, seen, mixer.nheads + mixer.kv_heads + group]
        y[b, t, h] = scores.softmax(0) @ values
    y = y.flatten(2)
    if mixer.mlp_dim:
        up, gate = mlp.chunk(2, -1)
        y = torch.cat([y, up * torch.nn.functional.silu(gate)], -1)
    return mixer.out_proj(y)


@pytest.mark.parametrize("name", [name for name in CAUSAL if "convolution" not in name and name != "all"])
def test_causal_formula(name):
    mixer = build(**CAUSAL[name])
    x = torch.randn(2, 7, 8, **DOUBLE)
    torch.testing.assert_close(mixer(x), by_loops(mixer, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 2, (1, 3), (-1, 0), (0, -1)])
def test_two_sided_formula(window):
    mixer = build(nheads=2, causal=False, window=window, rotary_dim=4)
    x = torch.randn(2, 6, 8, **DOUBLE)
    torch.testing.assert_close(mixer(x), by_loops(mixer, x), rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match="Attention sees both directions"):
        mixer.prefill(x)


@pytest.mark.parametrize("name", CAUSAL)
def test_any_cut_is_exact(name):
    mixer = build(**CAUSAL[name])
    x = torch.randn(2, 13, 8, **DOUBLE)
    whole, last = mixer.prefill(x)
    torch.testing.assert_close(whole, mixer(x), rtol=1e-10, atol=1e-12)
    for pieces in ([1] * 13, [4, 1, 8], [12, 1], [1, 7, 5], [5, 0, 8]):
        state, outputs = None, []
        for piece in x.split(pieces, 1):
            y, state = mixer.prefill(piece, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-10, atol=1e-12)
        for key, value in last.tensors().items():
            torch.testing.assert_close(state.tensors()[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CAUSAL)
def test_fixed_slots_are_the_same(name):
    mixer = build(**CAUSAL[name])
    x = torch.randn(2, 9, 8, **DOUBLE)
    state, outputs = mixer.init_state(2, slots=9), []
    shape = state.k.shape
    for position in x.unbind(1):
        y, state = mixer.step(position, state)
        outputs.append(y)
        assert state.k.shape == shape
    torch.testing.assert_close(torch.stack(outputs, 1), mixer(x), rtol=1e-10, atol=1e-12)
    if mixer.window[0] is None:
        assert isinstance(state, FixedAttentionState)
        with pytest.raises(ValueError, match="`state` has 9 slots, expected at least 10"):
            mixer.step(x[:, 0], state)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("slots", [None, 20])
def test_padded_rows_are_single_rows(name, slots):
    mixer = build(**CAUSAL[name])
    spans = [(0, 6), (2, 6), (1, 5), (0, 3), (3, 3)]
    rows = len(spans)
    x, more = torch.randn(rows, 6, 8, **DOUBLE), torch.randn(rows, 8, **DOUBLE)
    before = mixer.prefill(torch.randn(rows, 4, 8, **DOUBLE), mixer.init_state(rows, slots=slots))[1]
    mask = torch.zeros(rows, 6, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    y, state = mixer.prefill(x, before, mask=mask)
    assert not y[~mask].any()
    after, _ = mixer.step(more, state)
    for row, (start, end) in enumerate(spans):
        own = before.select(torch.tensor([row]))
        alone, own = mixer.prefill(x[row : row + 1, start:end], own)
        torch.testing.assert_close(y[row : row + 1, start:end], alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(after[row : row + 1], mixer.step(more[row : row + 1], own)[0])
        assert state.length[row] == own.length


@pytest.mark.parametrize("name", CAUSAL)
def test_packing_and_resets(name):
    mixer = build(**CAUSAL[name])
    x, more = torch.randn(2, 9, 8, **DOUBLE), torch.randn(2, 8, **DOUBLE)
    before = mixer.prefill(torch.randn(2, 4, 8, **DOUBLE))[1]
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 0] = reset[0, 6] = reset[1, 5] = reset[1, 6] = True
    y, state = mixer.prefill(x, before, reset=reset)
    after, _ = mixer.step(more, state)
    for row, cuts in enumerate(([0, 0, 6], [0, 5, 6])):
        own, outputs = before.select(torch.tensor([row])), []
        for start, end in zip(cuts, [*cuts[1:], 9]):
            own = own if start == 0 and end > 0 and row == 1 else None
            piece, own = mixer.prefill(x[row : row + 1, start:end], own)
            outputs.append(piece)
        torch.testing.assert_close(y[row : row + 1], torch.cat(outputs, 1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(after[row : row + 1], mixer.step(more[row : row + 1], own)[0])
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 4, 4, 4, 4]] * 2)
    whole = mixer(x, seq_idx=seq_idx)
    separate = torch.cat([mixer(x[:, :3]), mixer(x[:, 3:5]), mixer(x[:, 5:])], 1)
    torch.testing.assert_close(whole, separate, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CAUSAL)
def test_mixing_matrix(name):
    mixer = build(**CAUSAL[name])
    x = torch.randn(2, 6, 8, **DOUBLE)
    state = mixer.prefill(torch.randn(2, 5, 8, **DOUBLE))[1]
    for given in (None, state):
        found = mixer.mixing_matrix(x, state=given)
        assert found.matrix.shape == (2, mixer.nheads, 6, 6)
        torch.testing.assert_close(found.apply(), found.outputs)
        assert not found.matrix.triu(1).any()
    torch.testing.assert_close(mixer.mixing_matrix(x).matrix.sum(-1), torch.ones(2, mixer.nheads, 6, **DOUBLE))


def test_rotary_scores_depend_on_distance_alone():
    mixer = build(nheads=2, rotary_dim=4)
    x = torch.randn(1, 5, 8, **DOUBLE)
    far = AttentionState(
        k=torch.zeros(1, 2, 0, 4, **DOUBLE),
        v=torch.zeros(1, 2, 0, 4, **DOUBLE),
        conv=torch.zeros(1, 0, 0, **DOUBLE),
        length=torch.tensor([0]),
    )
    q, k, _, _, _ = mixer._project(x, far, Layout())
    shifted = AttentionState(**{**far.tensors(), "length": torch.tensor([100_000])})
    q2, k2, _, _, _ = mixer._project(x, shifted, Layout())
    assert not torch.allclose(q, q2)
    torch.testing.assert_close(q @ k.mT, q2 @ k2.mT, rtol=1e-8, atol=1e-8)


def test_ring_buffer_has_the_size_of_the_window():
    mixer = build(nheads=2, window=3)
    state = mixer.prefill(torch.randn(1, 50, 8, **DOUBLE))[1]
    assert state.k.shape == (1, 2, 3, 4)
    assert mixer.state_numel(1000) == state.k.numel() + state.v.numel()
    wide = build(nheads=2)
    assert wide.state_numel(50) == 2 * wide.prefill(torch.randn(1, 50, 8, **DOUBLE))[1].k.numel()


def test_parameters():
    mixer = Attention(64, nheads=4, kv_heads=2, d_conv=4, mlp_dim=32, qkv_bias=True)
    qkv = (4 + 2 * 2) * 16
    assert sum(p.numel() for p in mixer.parameters()) == (qkv + 32) * 65 + 5 * qkv + 64 * (64 + 16)
    assert mixer.no_decay_names() == ("in_proj.bias", "conv1d.bias")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headdim": 3}, "heads must divide the width: d_model=8"),
        ({"nheads": 3}, "heads must divide the width: d_model=8, got nheads=3, headdim=None; name both"),
        ({"nheads": 2, "kv_heads": 0}, "`kv_heads` must divide nheads=2, got 0"),
        ({"nheads": 2, "kv_heads": -1}, "`kv_heads` must divide nheads=2, got -1"),
        ({"nheads": 4, "kv_heads": 3}, "`kv_heads` must divide nheads=4, got 3"),
        ({"nheads": 2, "rotary_dim": 6}, "at most headdim=4, got 6"),
        ({"nheads": 2, "rotary_dim": 3}, "must be even"),
        ({"rotation": "both"}, "'half' or 'interleaved', got 'both'"),
        ({"window": (1, 2, 3)}, r"must be \(left, right\)"),
        ({"mlp_dim": 3}, "`mlp_dim` must be even"),
        ({"d_conv": 4, "causal": False}, "looks back only"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(8, **options)


def test_wrong_states():
    mixer = build(nheads=2)
    x = torch.randn(2, 3, 8, **DOUBLE)
    with pytest.raises(TypeError, match="`state` must be a AttentionState, got dict"):
        mixer.prefill(x, {})
    with pytest.raises(ValueError, match=r"`state.k` must have shape \(2, 2, 0, 4\)"):
        mixer.prefill(x, mixer.init_state(3))


@pytest.mark.parametrize("options", ["plain", "rotary", "convolution", "mlp"])
def test_a_large_state_of_which_all_is_seen_takes_no_mask(options, monkeypatch):
    mixer, x = build(**{"nheads": 2} | CAUSAL[options]), torch.randn(2, 12, 8, **DOUBLE)
    whole = mixer(x)
    _, state = mixer.prefill(x[:, :5])
    padded = torch.ones(2, 5, dtype=torch.bool)
    padded[1, 3:] = False
    _, short = mixer.prefill(x[:, :5], mask=padded)
    expected, _ = mixer.prefill(x[:, 5:], short)
    monkeypatch.setattr("omnissm.ssmcore.mixers.attention.LARGE", 1)
    torch.testing.assert_close(mixer.prefill(x[:, 5:], short)[0], expected)  # a row with slots that hold nothing
    monkeypatch.setattr(Attention, "_keys", lambda *_: pytest.fail("a mask was made"))
    torch.testing.assert_close(mixer.prefill(x[:, 5:], state)[0], whole[:, 5:])
    torch.testing.assert_close(mixer.step(x[:, 5], state)[0], whole[:, 5])
