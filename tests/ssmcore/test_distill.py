"""Distillation: losses that are zero where they should be, and a transplant that computes linear attention."""

import math

import pytest
import torch

from omnissm.ssmcore.distill import hidden_loss, logit_loss, matrix_loss, transplant
from omnissm.ssmcore.mixers import Attention, DiscreteMamba2

DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_transplant_is_linear_attention(kv_heads):
    torch.manual_seed(0)
    attention = Attention(16, nheads=4, kv_heads=kv_heads, **DOUBLE)
    student = DiscreteMamba2(16, nheads=4, d_state=4, bias=True, **DOUBLE)
    transplant(attention, student)
    x = torch.randn(2, 11, 16, **DOUBLE)
    q, k, v = attention.in_proj(x).unflatten(-1, (-1, 4)).transpose(1, 2).split([4, kv_heads, kv_heads], dim=1)
    k, v = (part.repeat_interleave(4 // kv_heads, dim=1) for part in (k, v))
    matrix = (q @ k.mT / 2).tril()
    torch.testing.assert_close(student.mixing_matrix(x).matrix, matrix, rtol=1e-8, atol=1e-8)
    expected = attention.out_proj((matrix @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(student(x), expected, rtol=1e-8, atol=1e-8)


def test_matrix_loss_reaches_zero_for_linear_attention_and_falls_for_softmax():
    torch.manual_seed(0)
    attention = Attention(8, nheads=2, **DOUBLE)
    teacher, student = (DiscreteMamba2(8, nheads=2, d_state=4, bias=True, **DOUBLE) for _ in range(2))
    transplant(attention, teacher)
    transplant(attention, student)
    x = torch.randn(2, 9, 8, **DOUBLE)
    assert matrix_loss(student, teacher, x) < 1e-12
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = matrix_loss(student, attention, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in attention.parameters())


def test_hidden_and_logit_loss():
    student, teacher = torch.randn(2, 5, 3, **DOUBLE), torch.randn(2, 5, 3, **DOUBLE)
    mask = torch.arange(5).expand(2, -1) < 3
    distance = (student - teacher).square().sum(-1).sqrt()
    torch.testing.assert_close(hidden_loss(student, teacher), distance.mean())
    torch.testing.assert_close(hidden_loss(student, teacher, mask), distance[:, :3].mean())
    even = torch.zeros(1, 1, 4)
    assert logit_loss(even, even).item() == pytest.approx(math.log(4))
    sharp = torch.tensor([[[50.0, 0.0, 0.0, 0.0]]])
    assert logit_loss(even, sharp).item() == pytest.approx(math.log(4))
    assert logit_loss(sharp, sharp).item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(logit_loss(student, teacher, temperature=2.0), logit_loss(student / 2, teacher / 2))


def test_sizes_that_do_not_fit():
    attention = Attention(16, nheads=4)
    with pytest.raises(ValueError, match="the student must have nheads=4 as the attention has, got 2"):
        transplant(attention, DiscreteMamba2(16, nheads=2, d_state=4))
    with pytest.raises(ValueError, match="expected an attention without convolution"):
        transplant(Attention(16, nheads=4, d_conv=3), DiscreteMamba2(16, nheads=4, d_state=4))
    with pytest.raises(ValueError, match="the attention has a bias in in_proj; build the student with bias=True"):
        transplant(Attention(16, nheads=4, qkv_bias=True), DiscreteMamba2(16, nheads=4, d_state=4))
    with pytest.raises(ValueError, match="give both as many heads"):
        matrix_loss(DiscreteMamba2(16, nheads=2, d_state=4), attention, torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="must agree in shape"):
        hidden_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        logit_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), temperature=0)
