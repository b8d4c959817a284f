"""Norms, MLP, residual blocks and stacks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omnissm.ssmcore import Chimera2D, GatedMLP, Residual, RMSNorm, Stack
from omnissm.ssmcore.blocks import parse_pattern

OPTIONS = {"d_state": 2}


def test_rms_norm():
    norm, x = RMSNorm(6), torch.randn(3, 6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    # The square of 300 overflows float16: statistics must be wider.
    assert norm(torch.full((1, 6), 300.0, dtype=torch.float16)).isfinite().all()
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_gated_mlp():
    mlp, x = GatedMLP(8, hidden=5), torch.randn(2, 8)
    value, gate = (x @ mlp.fc1.weight.T).split(5, dim=-1)
    torch.testing.assert_close(mlp(x), (value * gate * gate.sigmoid()) @ mlp.fc2.weight.T)
    assert GatedMLP(64).fc2.in_features == 256  # 8 * 64 / 3 = 170.7, rounded up to a multiple of 128
    assert GatedMLP(48).fc2.in_features == 128  # exactly 128


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_residual(norm):
    x = torch.randn(2, 8)
    mixer, mlp = nn.Linear(8, 8), GatedMLP(8)
    pre = Residual(8, mixer, mlp, norm=norm)
    normed = F.rms_norm if norm == "rms" else F.layer_norm
    middle = x + mixer(normed(x, (8,), eps=1e-5))
    torch.testing.assert_close(pre(x), middle + mlp(normed(middle, (8,), eps=1e-5)))
    post = Residual(8, mixer, mlp, norm=norm, norm_position="post")
    middle = normed(x + mixer(x), (8,), eps=1e-5)
    torch.testing.assert_close(post(x), normed(middle + mlp(middle), (8,), eps=1e-5))


def test_stream_stays_float32():
    """Many small updates to a large stream: 16-bit additions would lose each of them."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return torch.full_like(x, 1e-3) * self.one

    x = torch.ones(2, 8, dtype=torch.bfloat16)
    for wide, expected in ((True, 1.1), (False, 1.0)):
        block = Residual(8, Small().bfloat16(), residual_in_fp32=wide, dtype=torch.bfloat16)
        stream = x
        for _ in range(100):
            stream = block(stream)
        assert stream.dtype == (torch.float32 if wide else torch.bfloat16)
        assert stream.mean().item() == pytest.approx(expected, rel=5e-3)


def test_forms_of_a_stack_are_equal():
    pattern = Stack(8, "c2C1", mixer_options=OPTIONS)
    listed = Stack(8, ["chimera2d", {"mixer": "chimera2d"}, {"mixer": "chimera2d", "mlp": True}], mixer_options=OPTIONS)
    listed.load_state_dict(pattern.state_dict())
    x = torch.randn(2, 3, 4, 8)
    assert torch.equal(pattern(x), listed(x))
    assert [block.mlp is not None for block in pattern.blocks] == [False, False, True]


def test_a_stack_takes_modules_and_leaves_their_weights_alone():
    mixer = Chimera2D(8, **OPTIONS)
    before = copy.deepcopy(mixer.state_dict())
    stack = Stack(8, [mixer, {"mixer": "chimera2d", "d_state": 3, "bidirectional": False}])
    assert stack.blocks[0].mixer is mixer
    assert all(torch.equal(value, before[name]) for name, value in mixer.state_dict().items())
    assert stack.blocks[1].mixer.directions == 1
    assert stack(torch.randn(1, 2, 3, 8)).shape == (1, 2, 3, 8)


def test_stack_passes_arguments_on():
    stack = Stack(8, "c2", mixer_options=OPTIONS)
    x = torch.randn(1, 2, 4, 8)
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    mask[0, 0, 1] = False
    assert not torch.allclose(stack(x, mask=mask), stack(x))


def test_output_matrices_start_smaller_with_depth():
    shallow, deep = Stack(64, "c1", mixer_options=OPTIONS), Stack(64, "C8", mixer_options=OPTIONS)
    ratio = shallow.blocks[0].mixer.out_proj.weight.std() / deep.blocks[0].mixer.out_proj.weight.std()
    assert ratio.item() == pytest.approx(4, rel=0.1)  # sqrt of 16 branches


def test_causal_if_all_mixers_are():
    assert Stack(8, "c1", mixer_options=OPTIONS).causal
    assert not Stack(8, [Chimera2D(8, **OPTIONS), nn.Identity()]).causal


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_nothing(every):
    stack = Stack(8, "c3", mixer_options=OPTIONS)
    x = torch.randn(2, 3, 4, 8)
    expected = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    stack.set_grad_checkpointing(every)
    got = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_pattern():
    assert parse_pattern("a2B1", {"a": "x", "b": "y"}) == [
        {"mixer": "x", "mlp": False},
        {"mixer": "x", "mlp": False},
        {"mixer": "y", "mlp": True},
    ]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("c", "letters with counts such as 'c2C1', got 'c'"),
        ("q2", "unknown letter 'q' in pattern 'q2'; known: c"),
        ("c0", "at least one layer"),
        ([], "at least one layer"),
        ([{"mlp": True}], "needs the entry 'mixer'"),
        (["chimera"], "Unknown mixer 'chimera'"),
    ],
    ids=str,
)
def test_unknown_layers_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        Stack(8, layers)


def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="`norm` must be 'rms' or 'layer', got 'batch'"):
        Residual(8, nn.Identity(), norm="batch")
    with pytest.raises(ValueError, match="`norm_position` must be 'pre' or 'post'"):
        Residual(8, nn.Identity(), norm_position="both")
