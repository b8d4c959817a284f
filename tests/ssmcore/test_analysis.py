"""Matrices of layers, dependence between tokens, and pictures."""

import pytest
import torch
from torch import nn

from omnissm.ssmcore import Stack, create_mixer
from omnissm.ssmcore.analysis import draw_matrix, mixing_matrices, span_rank, token_jacobian

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
