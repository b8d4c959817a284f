"""Distillation: losses that are zero where they should be, and a transplant that computes linear attention."""

import math

import pytest
import torch

from omnissm.ssmcore import SequenceModel, Stack
from omnissm.ssmcore.distill import (
    HybridAttention,
    attention_layers,
    convert,
    head_scores,
    hidden_loss,
    logit_loss,
    matrix_loss,
    select_heads,
    stage_loss,
    top_heads,
    transplant,
)
from omnissm.ssmcore.mixers import Attention, Bidirectional, DiscreteMamba2

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


def build(layers="t1T1", **options) -> SequenceModel:
    torch.manual_seed(0)
    own = {"headdim": 4, "nheads": 4, "kv_heads": 2, "rotary_dim": 2, "qkv_bias": True, "out_bias": True, **options}
    model = SequenceModel(12, layers, vocab_size=9, mixer_options={"attention": own}, **DOUBLE).requires_grad_(False)
    for name, parameter in model.named_parameters():  # attention matters, and predictions are far from uniform
        if name.endswith(("embedding.weight", "_proj.weight")):
            parameter.normal_(std=0.5)
    return model


def test_heads_add_up_to_the_attention():
    attention = build().stack.blocks[0].mixer
    x = torch.randn(2, 7, 12, **DOUBLE)
    parts = [select_heads(attention, heads)(x) for heads in ([2], [0, 3], [1])]
    expected = attention(x) + 2 * attention.out_proj.bias  # each part adds it
    torch.testing.assert_close(sum(parts), expected, rtol=1e-10, atol=1e-10)
    matrix = attention.mixing_matrix(x).matrix[:, [3, 0]]
    torch.testing.assert_close(select_heads(attention, [3, 0]).mixing_matrix(x).matrix, matrix)


def test_a_student_that_keeps_all_heads_is_the_teacher_and_one_that_keeps_none_has_linear_attention():
    model, ids = build(rotary_dim=0), torch.randint(9, (2, 8))
    names = list(attention_layers(model))
    assert names == ["stack.blocks.0.mixer", "stack.blocks.1.mixer"]
    same = convert(model, dict.fromkeys(names, range(4)))
    assert torch.equal(same(ids), model(ids))
    student = convert(model)
    assert not attention_layers(student)
    assert attention_layers(model)
    x = torch.randn(2, 8, 12, **DOUBLE)
    attention, mixer = (one.stack.blocks[0].mixer for one in (model, student))
    q, k, _ = attention.in_proj(x).unflatten(-1, (-1, 4)).transpose(1, 2).split([4, 2, 2], dim=1)
    matrix = (attention.scale * q @ k.repeat_interleave(2, dim=1).mT).tril()
    torch.testing.assert_close(mixer.mixing_matrix(x).matrix, matrix, rtol=1e-8, atol=1e-8)


def test_hybrids_keep_their_heads():
    model = build()
    name = "stack.blocks.1.mixer"
    student = convert(model, {name: [3, 1]})
    hybrid, attention = student.get_submodule(name), model.get_submodule(name)
    assert isinstance(hybrid, HybridAttention)
    assert (hybrid.kept, hybrid.replaced) == ((1, 3), (0, 2))
    x = torch.randn(2, 6, 12, **DOUBLE)
    torch.testing.assert_close(hybrid.first(x), select_heads(attention, [1, 3])(x))
    values = select_heads(attention, [0, 2])
    values.out_proj.bias = None
    other = DiscreteMamba2(12, nheads=2, d_state=4, expand=8 / 12, bias=True, **DOUBLE)
    transplant(values, other)
    torch.testing.assert_close(hybrid.second(x), other(x))
    ids = torch.randint(9, (1, 6))  # it decodes like any model
    _, state = student.prefill(ids[:, :4])
    for place in (4, 5):
        last, state = student.step(ids[:, place], state)
    torch.testing.assert_close(last, student(ids)[:, -1], rtol=1e-8, atol=1e-8)


def test_states_shrink_with_the_heads_that_go():
    model, ids = build(kv_heads=4), torch.randint(9, (1, 100))
    names = list(attention_layers(model))
    sizes = [
        convert(model, keep).prefill(ids)[1].nbytes for keep in (dict.fromkeys(names, range(4)), {names[0]: [0]}, {})
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_attention_that_sees_both_directions():
    torch.manual_seed(0)
    stack = Stack(8, [{"mixer": "attention", "nheads": 2, "causal": False, "out_bias": True}], **DOUBLE)
    student = convert(stack)
    mixer = student.blocks[0].mixer
    assert isinstance(mixer, Bidirectional)
    x = torch.randn(1, 6, 8, **DOUBLE)
    attention = stack.blocks[0].mixer
    q, k, v = attention.in_proj(x).unflatten(-1, (-1, 4)).transpose(1, 2).split([2, 2, 2], dim=1)
    matrix = attention.scale * q @ k.mT
    matrix = matrix + matrix * torch.eye(6, **DOUBLE)  # a position itself counts twice
    expected = attention.out_proj((matrix @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-8, atol=1e-8)
    for stage in ("matrix", "hidden", "logits"):
        assert stage_loss(stage, stack, student, lambda model: model(x)) > 0


@pytest.mark.parametrize("keep", [{}, {"stack.blocks.0.mixer": [1]}], ids=["none", "one"])
def test_stages_fall_and_leave_the_teacher_alone(keep):
    model, ids = build("t2"), torch.randint(9, (2, 8))
    student = convert(model, keep).requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for stage in ("matrix", "hidden", "logits"):
        optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
        losses = []
        for _ in range(15):
            loss = stage_loss(stage, model, student, lambda one: one(ids))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_first_stage_is_zero_between_equal_matrices():
    """The student of a student: linear attention already."""
    model, ids = build("t1", rotary_dim=0), torch.randint(9, (2, 8))
    student = convert(model, {"stack.blocks.0.mixer": [0]})
    x = model.stack.blocks[0].norm(model.embedding(ids))
    attention, hybrid = model.stack.blocks[0].mixer, student.stack.blocks[0].mixer
    gap = attention.mixing_matrix(x).matrix[:, 1:] - hybrid.second.mixing_matrix(x).matrix
    expected = torch.linalg.matrix_norm(gap).mean()
    torch.testing.assert_close(stage_loss("matrix", model, student, lambda one: one(ids)), expected)
    assert stage_loss("logits", model, convert(model, {"stack.blocks.0.mixer": range(4)}), lambda one: one(ids)) > 0


def test_heads_are_scored_by_what_is_lost_without_them():
    model, ids = build("t2"), torch.randint(9, (2, 8))
    with torch.no_grad():
        model.stack.blocks[1].mixer.out_proj.weight[:, 4:8] = 0  # head 1 of the second layer does nothing

    def loss(one):
        return torch.nn.functional.cross_entropy(one(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    scores = head_scores(model, loss)
    assert scores["stack.blocks.1.mixer"][1] == 0
    assert not model.stack.blocks[0].mixer.out_proj._forward_pre_hooks
    whole = loss(model)
    model.stack.blocks[0].mixer.out_proj.weight[:, 8:12] = 0
    torch.testing.assert_close(scores["stack.blocks.0.mixer"][2], loss(model) - whole)
    scores = {"a": torch.tensor([0.1, 3.0, -1.0]), "b": torch.tensor([2.0, 0.0, 5.0])}
    assert top_heads(scores, 3) == {"a": (1,), "b": (0, 2)}
    assert top_heads(scores, 0) == {}


def test_students_that_cannot_be():
    model = build()
    with pytest.raises(ValueError, match=r"no attention 'layer'; the model has stack\.blocks\.0\.mixer"):
        convert(model, {"layer": [0]})
    with pytest.raises(ValueError, match="has heads 0 to 3, got 4"):
        convert(model, {"stack.blocks.0.mixer": [4]})
    with pytest.raises(TypeError, match=r"must name heads of 'stack\.blocks\.0\.mixer' such as \[0, 2\], got 1"):
        convert(model, {"stack.blocks.0.mixer": 1})
    with pytest.raises(ValueError, match="has no attention to replace"):
        convert(convert(model))
    with pytest.raises(ValueError, match="has no attention heads to score"):
        head_scores(convert(model), lambda one: torch.zeros(()))
    with pytest.raises(ValueError, match="`count` must lie in 0 to 2"):
        top_heads({"a": torch.zeros(2)}, 3)
    ids = torch.randint(9, (1, 3))
    with pytest.raises(ValueError, match="`stage` must be one of 'matrix', 'hidden', 'logits'"):
        stage_loss("attention", model, model, lambda one: one(ids))
    with pytest.raises(ValueError, match="as much attention as the teacher"):
        stage_loss("hidden", model, model, lambda one: one(ids))
