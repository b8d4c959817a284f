"""Norms, MLP, residual blocks and stacks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from omnissm.ssmcore import Chimera2D, GatedMLP, Residual, RMSNorm, Stack, create_mixer
from omnissm.ssmcore.parallel import DoubleMixer
from omnissm.ssmcore.patterns import parse_pattern
from omnissm.ssmcore.testing.sequence import (
    check_compile,
    check_no_future,
    check_sequence_shape,
    check_sequence_state_dict,
)

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
        ("c", "letters with counts such as 'm2T1', got 'c'"),
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


@pytest.mark.parametrize("options", [{}, {"norm_position": "post"}, {"residual_in_fp32": False}], ids=str)
def test_layer_norms_of_a_converted_stack(options):
    """The stream is wider than the weights, which layer norms of torch do not take."""
    torch.manual_seed(0)
    stack = Stack(8, "M2", mixer_options={"d_state": 4, "headdim": 4}, mlp_hidden=8, norm="layer", **options)
    x = torch.randn(2, 5, 8)
    expected = stack(x)
    got = copy.deepcopy(stack).bfloat16()(x.bfloat16())
    assert got.dtype == (torch.float32 if options.get("residual_in_fp32", True) else torch.bfloat16)
    assert (got - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="`norm` must be 'rms' or 'layer', got 'batch'"):
        Residual(8, nn.Identity(), norm="batch")
    with pytest.raises(ValueError, match="`norm_position` must be 'pre' or 'post'"):
        Residual(8, nn.Identity(), norm_position="both")


DOUBLE = {"dtype": torch.float64}
HYBRID = [
    {"mixer": "mamba2", "d_state": 8, "headdim": 4},
    {"mixer": "attention", "nheads": 2, "rotary_dim": 4, "mlp": True},
    {"mixer": "s4d", "d_state": 4},
    {"mixer": "attention", "nheads": 2, "window": 3},
    {"mixer": [{"mixer": "mamba2", "d_state": 8, "headdim": 4}, {"mixer": "attention", "nheads": 2}], "merge": "sum"},
]


def hybrid(**options):
    torch.manual_seed(0)
    return Stack(8, HYBRID, **DOUBLE, **options)


@pytest.mark.parametrize("options", [{}, {"norm_position": "post", "norm": "layer"}], ids=["pre", "post"])
def test_a_hybrid_goes_on_from_any_cut(options):
    stack = hybrid(**options)
    x = torch.randn(2, 9, 8, **DOUBLE)
    whole, last = stack.prefill(x)
    torch.testing.assert_close(whole, stack(x))
    state, outputs = stack.init_state(2), []
    for piece in x[:, :7].split([4, 1, 2], 1):
        y, state = stack.prefill(piece, state)
        outputs.append(y)
    for position in x[:, 7:].unbind(1):
        y, state = stack.step(position, state)
        outputs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert state.position.tolist() == [9, 9]
    for one, other in zip(pytree.tree_leaves(state), pytree.tree_leaves(last)):
        torch.testing.assert_close(one, other)


def test_state_of_a_stack_is_one_value():
    stack = hybrid()
    x, more = torch.randn(3, 5, 8, **DOUBLE), torch.randn(3, 8, **DOUBLE)
    state = stack.prefill(x)[1]
    assert state.batch_size == 3
    assert state.nbytes == sum(leaf.nbytes for leaf in pytree.tree_leaves(state))
    rows = torch.tensor([2, 0, 2])
    expected, _ = stack.step(more, state)
    got, _ = stack.step(more[rows], state.select(rows))
    torch.testing.assert_close(got, expected[rows])
    narrow = state.to(dtype=torch.bfloat16)
    assert narrow.layers[0].ssm.dtype == torch.float32
    assert narrow.layers[0].conv.dtype == narrow.layers[1].k.dtype == torch.bfloat16
    assert narrow.position.dtype == torch.int64
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(state.detach()))


def test_padding_packing_and_position_of_a_stack():
    stack = hybrid()
    x = torch.randn(2, 7, 8, **DOUBLE)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1] * 7]).bool()
    y, state = stack.prefill(x, mask=mask)
    alone, _ = stack.prefill(x[:1, 2:6])
    torch.testing.assert_close(y[:1, 2:6], alone)
    assert state.position.tolist() == [4, 7]
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 2]])
    y, state = stack.prefill(x, state, seq_idx=seq_idx)
    assert state.position.tolist() == [4, 1]
    torch.testing.assert_close(y[:1, 3:], stack(x[:1, 3:]))
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[0, 0] = reset[1, 5] = True
    y, state = stack.prefill(x, state, reset=reset)
    assert state.position.tolist() == [7, 2]
    torch.testing.assert_close(y[:1], stack(x[:1]))


def test_checkpointing_does_not_touch_states():
    stack = hybrid()
    x = torch.randn(2, 5, 8, **DOUBLE)
    expected, state = stack.prefill(x)
    stack.set_grad_checkpointing()
    got, same = stack.prefill(x)
    torch.testing.assert_close(got, expected)
    for one, other in zip(pytree.tree_leaves(same), pytree.tree_leaves(state)):
        torch.testing.assert_close(one, other)


def test_two_sided_layers_have_no_state():
    stack = Stack(8, "m1h1", mixer_options={"headdim": 4, "d_state": 8})
    assert stack(torch.randn(1, 5, 8)).shape == (1, 5, 8)
    for call in (lambda: stack.prefill(torch.randn(1, 5, 8)), lambda: stack.init_state(1)):
        with pytest.raises(TypeError, match=r"layer 1 \(Hydra\) has no state, so neither has the stack"):
            call()


def test_number_of_layers_with_attention_among_them():
    options = {"mamba2": {"headdim": 4, "d_state": 8}, "attention": {"nheads": 2}}
    first = Stack(8, 3, mixer="mamba2", attn_layers=[1], mixer_options=options)
    second = Stack(8, "m1t1m1", mixer_options=options)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 5, 8)
    assert torch.equal(first(x), second(x))
    assert [type(block.mixer).__name__ for block in first.blocks] == ["Mamba2", "Attention", "Mamba2"]
    assert Stack(8, 1, mixer="s4d", mlp=True).blocks[0].mlp is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Stack(8, 2), "2 layers of which mixer"),
        (lambda: Stack(8, 2, mixer="s4d", attn_layers=[2]), "`attn_layers` must lie in 0 to 1, got 2"),
        (lambda: Stack(8, "s1", mixer="s4d"), "go with a number of layers"),
        (lambda: Stack(8, [{"mixer": ["s4d"]}]), "side by side are two, got 1"),
        (lambda: Stack(8, [{"mixer": ["s4d", "s4d"], "d_state": 4}]), "stand in their own entries"),
        (lambda: Stack(8, [{"mixer": ["s4d", "s4d"], "merge": "max"}]), "`merge` must be 'sum'"),
        (lambda: hybrid().step(torch.zeros(1, 8), Stack(8, "s1").init_state(1)), "is of 1 layers, expected 5"),
    ],
)
def test_wrong_layers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_states_of_other_batches_or_none_are_refused_by_name():
    stack = Stack(8, "m1t1", mixer_options={"mamba2": {"d_state": 4, "headdim": 4}, "attention": {"nheads": 2}})
    _, state = stack.prefill(torch.randn(2, 4, 8))
    rows = torch.ones(3, 4, dtype=torch.bool)
    for given in ({}, {"mask": rows}, {"reset": rows}, {"seq_idx": rows.int()}):
        with pytest.raises(ValueError, match=r"`state.conv` must have shape \(3, 24, 3\), got \(2, 24, 3\)"):
            stack.prefill(torch.randn(3, 4, 8), state, **given)
    with pytest.raises(TypeError, match="`state` must be a StackState, got NoneType"):
        stack.step(torch.randn(2, 8), None)
    both = Stack(8, [{"mixer": ["mamba2", "mamba2"]}], mixer_options={"d_state": 4, "headdim": 4}).blocks[0].mixer
    for call in (lambda: both.step(torch.randn(2, 8), None), lambda: both.prefill(torch.randn(2, 4, 8), state)):
        with pytest.raises(TypeError, match="`state` must be a PairState"):
            call()
    with pytest.raises(NotImplementedError, match="no single matrix"):
        both.mixing_matrix(torch.randn(2, 4, 8))


def test_pieces_without_positions_leave_the_state_of_a_stack():
    stack = Stack(8, "m1t1", mixer_options={"mamba2": {"d_state": 4, "headdim": 4}, "attention": {"nheads": 2}})
    _, state = stack.prefill(torch.randn(2, 4, 8))
    y, after = stack.prefill(torch.randn(2, 0, 8), state, reset=torch.ones(2, 0, dtype=torch.bool))
    assert y.shape == (2, 0, 8)
    for a, b in zip(pytree.tree_leaves(after), pytree.tree_leaves(state), strict=True):
        assert torch.equal(a, b)


def test_state_of_something_else_is_refused():
    with pytest.raises(TypeError, match="must be a StackState, got dict"):
        hybrid().step(torch.zeros(1, 8, **DOUBLE), {})


@pytest.mark.parametrize("merge", ["sum", "norm_mean", "adapter"])
def test_two_mixers_side_by_side(merge):
    torch.manual_seed(0)
    first = create_mixer("mamba2", 8, d_state=8, headdim=4, **DOUBLE)
    second = create_mixer("attention", 8, nheads=2, **DOUBLE)
    both = DoubleMixer(8, first, second, merge=merge, **DOUBLE)
    x = torch.randn(2, 6, 8, **DOUBLE)
    a, b = first(x), second(x)
    rms = [t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() for t in (a, b)]
    given = (b - b.mean(-1, keepdim=True)) / (b.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    given = a.mean(-1, keepdim=True) + given * (a.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    expected = {"sum": a + b, "norm_mean": (rms[0] + rms[1]) / 2, "adapter": (a + given) / 2}[merge]
    torch.testing.assert_close(both(x), expected)
    for check in (check_sequence_shape, check_no_future, check_sequence_state_dict):
        check(both.float())


@pytest.mark.parametrize("merge", ["adapter", *(pytest.param(m, marks=pytest.mark.slow) for m in ("sum", "norm_mean"))])
def test_two_mixers_side_by_side_compile(merge):
    first, second = create_mixer("mamba2", 8, d_state=8, headdim=4), create_mixer("attention", 8, nheads=2)
    check_compile(DoubleMixer(8, first, second, merge=merge))


def test_side_by_side_with_a_two_sided_mixer():
    both = DoubleMixer(8, create_mixer("hydra", 8, headdim=4, d_state=8), create_mixer("s4d", 8))
    assert not both.causal
    assert both.state_type is None
    with pytest.raises(TypeError, match="sees both directions"):
        both.prefill(torch.randn(1, 3, 8))
