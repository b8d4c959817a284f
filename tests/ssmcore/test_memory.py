"""Gated memory units: what they compute, which layer they read, and stacks with them."""

import pytest
import torch
import torch.nn.functional as F

from omnissm.ssmcore import Stack, create_mixer
from omnissm.ssmcore.mixers import GatedMemoryUnit

OPTIONS = {"mamba2": {"d_state": 4, "headdim": 4}, "attention": {"nheads": 2}}
DOUBLE = {"dtype": torch.float64}


def build(layers="m1t1g1m1g1"):
    torch.manual_seed(0)
    return Stack(8, layers, mixer_options=OPTIONS, **DOUBLE)


def test_equation_and_parameters():
    unit = GatedMemoryUnit(8, norm=True, **DOUBLE)
    x, m = torch.randn(2, 5, 8, **DOUBLE), torch.randn(2, 5, 8, **DOUBLE)
    gate = F.silu(x @ unit.in_proj.weight.T)
    expected = (m / (m.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gate) @ unit.out_proj.weight.T
    torch.testing.assert_close(unit(x, memory=m), expected)
    assert sum(p.numel() for p in unit.parameters()) == 2 * 64 + 8
    assert unit.state_numel() == 0
    mask = torch.tensor([[True] * 5, [False, True, True, True, False]])
    assert not unit(x, memory=m, mask=mask)[~mask].any()


def test_units_read_the_latest_recurrent_layer_before_them():
    assert build()._reads == {2: 0, 4: 3}
    assert build("t1g2")._reads == {1: 0, 2: 0}
    assert build(["mamba2", "mamba2", {"mixer": "gmu", "reads": 0}])._reads == {2: 0}


def test_a_stack_written_out():
    stack, x = build("m1t1g1"), torch.randn(2, 9, 8, **DOUBLE)
    stream, outputs = x, []
    for block in stack.blocks:
        inner = block.norm(stream)
        given = {"memory": outputs[0]} if isinstance(block.mixer, GatedMemoryUnit) else {}
        outputs.append(block.mixer(inner, **given))
        stream = stream + outputs[-1]
    torch.testing.assert_close(stack(x), stack.norm(stream))


def test_cuts_and_padding():
    stack, x = build(), torch.randn(2, 12, 8, **DOUBLE)
    y = stack(x)
    first, state = stack.prefill(x[:, :7])
    second, state = stack.prefill(x[:, 7:11], state)
    last, state = stack.step(x[:, 11], state)
    torch.testing.assert_close(torch.cat([first, second, last[:, None]], dim=1), y)
    chosen, _ = stack.step(x[:1, 0], state.select(torch.tensor([1])))
    torch.testing.assert_close(chosen, stack.step(x[[0, 0], 0], state)[0][1:])
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = False
    torch.testing.assert_close(stack(x, mask=mask)[:1, 4:], stack(x[:1, 4:]))


def test_no_gradient_from_the_future_and_to_all_parameters():
    stack, x = build(), torch.randn(1, 10, 8, **DOUBLE, requires_grad=True)
    (dx,) = torch.autograd.grad(stack(x)[:, 4].sum(), x)
    assert dx[:, :5].abs().amax((0, 2)).min() > 0
    assert not dx[:, 5:].any()
    expected = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in expected)
    stack.set_grad_checkpointing()
    again = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    for one, other in zip(expected, again):
        torch.testing.assert_close(one, other)


def test_refusals():
    with pytest.raises(ValueError, match="layer 0 is a gated memory unit and has no earlier layer"):
        build("g1m1")
    with pytest.raises(ValueError, match=r"layer 1 reads layer 3, expected an earlier layer with a mixer: \[0\]"):
        build(["mamba2", {"mixer": "gmu", "reads": 3}, "mamba2", "mamba2"])
    unit = create_mixer("gmu", 8)
    with pytest.raises(ValueError, match=r"got none; a Stack hands it in"):
        unit(torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match=r"got shape \(1, 3, 8\)"):
        unit(torch.zeros(1, 2, 8), memory=torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="`reads` is a layer counted from 0, got -1"):
        create_mixer("gmu", 8, reads=-1)
    with pytest.raises(NotImplementedError, match="ask the layer that it reads"):
        unit.mixing_matrix(torch.zeros(1, 2, 8))
