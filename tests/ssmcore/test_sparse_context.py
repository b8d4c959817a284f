"""HAX: which keys it attends to, by a loop over positions; what it becomes with all keys; how its score learns."""

import numpy as np
import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers import HAX, Mamba2
from omnissm.ssmcore.mixers.common import Layout
from omnissm.ssmcore.mixers.sparse_context import _select_loss

DOUBLE = {"dtype": torch.float64}
GOLDEN = [4.890152493639, -0.534866112023, -0.200869992860]  # sum, last, and one of the middle
SIZES = {"d_state": 4, "headdim": 4, "key_dim": 3}


def build(**options):
    torch.manual_seed(0)
    return HAX(8, **SIZES | {"budget": 6, "num_hash": 2} | options, **DOUBLE)


def attended(mixer, u):
    """Weights (l, l) of the sparse attention on a signal (l, d_inner), one position after another."""
    k, q = np.split((u @ mixer.qk_proj.weight.T).detach().numpy(), 2, axis=1)
    share, n = mixer.budget // len(mixer.sources), k.shape[1]
    weights, bins, scores = np.zeros((len(u), len(u))), [], []
    for t in range(len(u)):
        chosen = set()
        if "lsh" in mixer.sources:
            directions = mixer.directions.numpy()
            own = tuple((k[t] - k[: t + 1].mean(0)) @ directions > 0)
            asked = tuple((q[t] - q[: t + 1].mean(0)) @ directions > 0)
            bins.append(own)
            chosen |= set([s for s in range(t + 1) if bins[s] == asked][-share:])
        if "select" in mixer.sources:
            seen = q[: t + 1].sum(0)
            with torch.no_grad():
                features = torch.tensor(np.concatenate([k[t], seen / np.linalg.norm(seen)]))
                scores.append(mixer.scorer(features).item())
            chosen |= set(np.argsort(-np.array(scores))[:share].tolist())
        chosen = sorted(chosen)
        if chosen:
            logits = k[chosen] @ q[t] / np.sqrt(n)
            weights[t, chosen] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    return weights


@pytest.mark.parametrize("sources", [("lsh",), ("select",), ("lsh", "select")], ids="-".join)
def test_keys_are_those_of_a_loop(sources):
    mixer = build(sources=sources)
    u = torch.sin(0.7 * torch.arange(30 * 16, **DOUBLE) ** 1.1).reshape(1, 30, 16)
    state = mixer._given(None, u[..., :8], torch.float64)
    extra, weights = mixer._attend(mixer._keys(u, state, Layout()), state, Layout())
    expected = attended(mixer, u[0])
    np.testing.assert_allclose(weights[0].detach().numpy(), expected, atol=1e-12)
    torch.testing.assert_close(extra, weights @ u)
    assert (expected > 0).sum(1).max() <= mixer.budget
    if sources == ("lsh",):  # a query may meet an empty bin, and then gets nothing
        empty = expected.sum(1) == 0
        assert 0 < empty.sum() < 30
        assert not extra[0, torch.tensor(empty)].any()


def test_golden_numbers():
    mixer = build(sources=("lsh", "select"), budget=4)
    with torch.no_grad():
        for number, tensor in enumerate((mixer.qk_proj.weight, mixer.directions, *mixer.scorer.parameters())):
            tensor.copy_(torch.sin(0.7 * torch.arange(tensor.numel(), **DOUBLE) + number).reshape(tensor.shape))
    u = torch.sin(0.7 * torch.arange(9 * 16, **DOUBLE) ** 1.1).reshape(1, 9, 16)
    state = mixer._given(None, u[..., :8], torch.float64)
    extra, weights = mixer._attend(mixer._keys(u, state, Layout()), state, Layout())
    np.testing.assert_allclose(weights[0].detach().numpy(), attended(mixer, u[0]), atol=1e-12)
    found = [extra.sum().item(), extra[0, -1, 0].item(), extra[0, 4, 3].item()]
    assert found == pytest.approx(GOLDEN, abs=1e-8)


def test_with_all_keys_it_is_causal_attention_beside_mamba2():
    mixer = build(budget=80)
    plain = Mamba2(8, d_state=4, headdim=4, **DOUBLE)
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if name in plain.state_dict()})
    x = torch.randn(2, 40, 8, **DOUBLE)
    own = plain.mixing_matrix(x)
    u = own.inputs.flatten(2)
    k, q = (u @ mixer.qk_proj.weight.T).chunk(2, dim=-1)
    attention = torch.nn.functional.scaled_dot_product_attention(q, k, u, is_causal=True)
    torch.testing.assert_close(mixer.mixing_matrix(x).outputs[..., 0], own.outputs.flatten(2) + attention)


def test_no_output_changes_with_later_inputs():
    """The choices do not either, which a gradient would not tell."""
    mixer = build()
    x = torch.randn(1, 30, 8, **DOUBLE)
    other = x.clone()
    other[:, 17:] = 5 * torch.randn(1, 13, 8, **DOUBLE)
    torch.testing.assert_close(mixer(x)[:, :17], mixer(other)[:, :17], rtol=1e-12, atol=1e-12)
    assert (mixer(x)[:, 17:] - mixer(other)[:, 17:]).abs().min() > 0


def test_the_score_learns_by_its_own_loss_alone():
    x, results = torch.randn(2, 20, 8, **DOUBLE), []
    for weight in (1.0, 3.0, 0.0):
        mixer = build(select_weight=weight)
        y = mixer(x)
        y.square().sum().backward()
        results.append((y, mixer.scorer[0].weight.grad, mixer.qk_proj.weight.grad))
    for y, _, shared in results[1:]:
        torch.testing.assert_close(y, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(shared, results[0][2])
    torch.testing.assert_close(results[1][1], 3 * results[0][1])
    assert results[2][1] is None
    mixer = build()
    optimizer = torch.optim.Adam(mixer.scorer.parameters(), lr=3e-2)
    state = mixer._given(None, x, torch.float64)
    with torch.no_grad():
        keys = mixer._keys(torch.randn(2, 20, 16, **DOUBLE), state, Layout())
        pairs = keys.q @ keys.k.mT
    visible = torch.ones(2, 20, 20, dtype=torch.bool).tril()
    losses = []
    for _ in range(60):
        score = mixer._keys(keys.v, state, Layout()).score
        loss = _select_loss(score, pairs, visible)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("way", ["autocast", "parameters"])
def test_scores_are_not_rounded_to_16_bits(way):
    """Few keys may be others than those of full precision, but 40 keys must have 40 scores."""
    mixer, x = build().float(), torch.randn(2, 40, 8)
    if way == "parameters":
        mixer, x = mixer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        y, state = mixer.prefill(x)
        later, after = mixer.step(x[:, 0], state)
    assert y.dtype == later.dtype == torch.bfloat16
    assert y.isfinite().all()
    for one in (state, after):
        kinds = {name: value.dtype for name, value in one.tensors().items() if value.is_floating_point()}
        assert {name for name, kind in kinds.items() if kind == torch.float32} == {"ssm", "sums", "score"}
        assert {kinds[name] for name in ("conv", "k", "v")} == {torch.bfloat16}
    assert all(len(row.unique()) == 40 for row in state.score)


def test_parameters_and_state():
    d, inner, n = 8, 16, 3
    mixer = build()
    plain = sum(p.numel() for p in Mamba2(d, d_state=4, headdim=4).parameters())
    scorer = 2 * (4 * n * n + 2 * n) + 2 * n + 1
    assert sum(p.numel() for p in mixer.parameters()) == plain + 2 * n * inner + inner + scorer
    _, state = mixer.prefill(torch.randn(1, 7, d, **DOUBLE))
    assert sum(t.numel() for t in state.tensors().values() if t.is_floating_point()) == mixer.state_numel(7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ("lhs",)}, "`sources` must be some of 'lsh' and 'select', got \\['lhs'\\]"),
        ({"budget": 1}, "`budget` at least 2"),
        ({"num_hash": 63}, "`num_hash` 1 to 62; got 64, 64 and 63"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("hax", 64, **options)
