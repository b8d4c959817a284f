"""Matrices of layers, dependence between tokens, and pictures."""

import pytest
import torch
from torch import nn

from omnissm.ssmcore import Stack, create_mixer
from omnissm.ssmcore.analysis import (
    block_ranks,
    draw_matrix,
    key_value_recall,
    linear_probe,
    mixing_matrices,
    retrieval_probe,
    span_rank,
    token_jacobian,
    token_norms,
)

DOUBLE = {"dtype": torch.float64}


def test_matrices_of_the_layers_of_a_stack():
    torch.manual_seed(0)
    stack = Stack(8, "m1h1t1", mixer_options={"mamba2": {"headdim": 4}, "hydra": {"headdim": 4}}, **DOUBLE)
    x = torch.randn(2, 7, 8, **DOUBLE)
    found = mixing_matrices(stack, x)
    assert list(found) == [0, 1, 2]
    for one in found.values():
        torch.testing.assert_close(one.apply(), one.outputs)
    second = stack.blocks[1]
    seen = second.norm(stack.blocks[0](x))
    torch.testing.assert_close(found[1].matrix, second.mixer.mixing_matrix(seen).matrix)
    assert found[1].matrix.triu(1).any()
    assert not found[2].matrix.triu(1).any()
    assert not stack.blocks[0].mixer._forward_pre_hooks


def test_jacobian_of_a_linear_map_is_the_map():
    torch.manual_seed(0)
    kernel = torch.randn(5, 5, 3, 3, **DOUBLE)  # t, s, output channel, input channel

    class Linear(nn.Module):
        def forward(self, x):
            return torch.einsum("tsec,bsc->bte", kernel, x)

    x = torch.randn(2, 5, 3, **DOUBLE)
    expected = kernel.square().sum((2, 3)).sqrt().expand(2, -1, -1)
    torch.testing.assert_close(token_jacobian(Linear(), x), expected)
    estimate = token_jacobian(Linear(), x, probes=500)
    torch.testing.assert_close(estimate, expected, rtol=0.15, atol=0)
    with pytest.raises(ValueError, match="`probes` must be at least 1"):
        token_jacobian(Linear(), x, probes=0)


@pytest.mark.parametrize("name", ["mamba2", "attention", "hydra"])
def test_jacobian_has_the_mixers_shape(name):
    torch.manual_seed(0)
    mixer = create_mixer(name, 4, headdim=4, **DOUBLE)
    reach = token_jacobian(mixer, torch.randn(1, 6, 4, **DOUBLE))
    assert (reach.tril() > 0)[0].tril().sum() == 21
    assert bool(reach.triu(1).any()) is (name == "hydra")


def test_span_of_heads():
    first, second = torch.randn(2, 5, 5, **DOUBLE).unbind(0)
    heads = torch.stack([first, second, first - 2 * second, 0 * first])
    assert span_rank(torch.stack([heads, heads[[0, 0, 0, 0]]])).tolist() == [2, 1]


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    figure = draw_matrix(torch.randn(6, 5, 5).tril(), "causal", heads=5)
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(images) == 5
    assert images[0][0, 4] == pytest.approx(-4)  # zero is drawn at the floor
    assert images[0].max() == pytest.approx(0)
    draw_matrix(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"must be \(h, l, l\) or \(l, l\)"):
        draw_matrix(torch.zeros(2, 3))


@pytest.mark.parametrize("states", [1, 3, 5])
def test_blocks_of_a_recurrence_have_at_most_the_rank_of_its_state(states):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, **DOUBLE)
    ssd = create_mixer("mamba2", 8, headdim=4, d_state=states, **DOUBLE)
    ranks = block_ranks(ssd.mixing_matrix(x).matrix)
    assert ranks.shape == (2, 4, 15)
    cuts = torch.arange(1, 16)
    full = torch.minimum(cuts, 16 - cuts)
    assert torch.equal(ranks, full.clamp(max=states).expand_as(ranks))
    hydra = create_mixer("hydra", 8, headdim=4, d_state=states, **DOUBLE)
    both = hydra.mixing_matrix(x).matrix
    for upper in (False, True):
        assert block_ranks(both, upper=upper).max() == states
    attention = create_mixer("attention", 8, nheads=2, **DOUBLE)
    softmax = block_ranks(attention.mixing_matrix(10 * x).matrix, tolerance=1e-12)
    assert softmax.max() > states
    assert not block_ranks(attention.mixing_matrix(x).matrix, upper=True).any()


def test_ranks_of_known_blocks():
    matrix = torch.zeros(4, 4, **DOUBLE)
    matrix[2, 0] = matrix[3, 1] = 1.0
    assert block_ranks(matrix).tolist() == [1, 2, 1]
    assert block_ranks(matrix.mT, upper=True).tolist() == [1, 2, 1]
    assert block_ranks(torch.ones(1, 1)).shape == (0,)
    with pytest.raises(ValueError, match=r"must be \(\.\.\., l, l\)"):
        block_ranks(torch.ones(2, 3))


def test_norms_through_the_layers():
    torch.manual_seed(0)

    class Double(nn.Module):
        def forward(self, x):
            return x

    stack = Stack(4, [Double(), Double()], **DOUBLE)
    x = torch.randn(2, 3, 4, **DOUBLE)
    norms = token_norms(stack, x)
    torch.testing.assert_close(norms[0], x.norm(dim=-1))
    grown = x + stack.blocks[0].norm(x)  # a vector of root mean square 1 in the direction of x
    torch.testing.assert_close(norms[1], grown.norm(dim=-1))
    torch.testing.assert_close(norms[2] - norms[1], torch.full((2, 3), 2.0, **DOUBLE), rtol=1e-4, atol=0)
    assert not stack.blocks[0]._forward_hooks


def test_recall_asks_for_what_was_stored():
    task = key_value_recall(50, 5, keys=9, values=4, generator=torch.Generator().manual_seed(0))
    assert task.ids.shape == (50, 11)
    for ids, answer in zip(task.ids.tolist(), task.answer.tolist()):
        keys, values = ids[:-1:2], ids[1::2]
        assert len(set(keys)) == 5
        assert max(keys) < 9 <= min(values) <= max(values) < 13
        assert values[keys.index(ids[-1])] == answer
    with pytest.raises(ValueError, match="as many keys as pairs, got rows=1, pairs=5, values=32 and keys=4"):
        key_value_recall(1, 5, keys=4)


def test_linear_probe():
    torch.manual_seed(0)
    labels = torch.randint(5, (400,)) + 7
    told = nn.functional.one_hot(labels - 7, 5).double() @ torch.randn(5, 8, **DOUBLE)
    assert linear_probe(told + 0.01 * torch.randn(400, 8, **DOUBLE) + 100, labels) == 1
    assert linear_probe(torch.randn(400, 8, **DOUBLE), labels) < 0.35
    with pytest.raises(ValueError, match="rows in both parts"):
        linear_probe(told, labels, train_share=1.0)


def test_the_probe_finds_the_layer_that_retrieves():
    torch.manual_seed(0)
    vectors = torch.randn(40, 32, **DOUBLE)

    class Nothing(nn.Module):
        def forward(self, x):
            return 0 * x

    class Lookup(nn.Module):
        """What stands behind the earlier token most like the last one."""

        def forward(self, x):
            place = (x[:, :-1] @ x[:, -1:].mT).argmax(1)
            return x.gather(1, (place + 1)[..., None].expand(-1, x.shape[1], x.shape[2]))

    before, idle, after = retrieval_probe(Stack(32, [Nothing(), Lookup()], **DOUBLE), vectors, 4, keys=20, rows=400)
    assert before == idle < 0.3
    assert after > 0.95
