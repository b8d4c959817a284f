"""Trees of positions through mixers and models: every node as after its path alone, and the state after any path."""

import pytest
import torch
from torch.utils import _pytree

from omnissm.kernels import token_tree
from omnissm.ssmcore import SequenceModel, Stack, create_mixer
from omnissm.ssmcore.cache import accept, allocate, verify
from omnissm.ssmcore.parallel import DoubleMixer

DOUBLE = {"dtype": torch.float64}
PARENT = [-1, 0, 0, 1, 3, 2, 5, 5, 4]
MIXERS = {
    "mamba2": ("mamba2", {"headdim": 4, "d_state": 5, "ngroups": 2}),
    "mamba2-channels": ("mamba2", {"headdim": 4, "d_state": 5, "D_has_hdim": True, "dt_limit": (0.01, 0.05)}),
    "discrete": ("discrete_mamba2", {"nheads": 2, "d_state": 4}),
    "attention": ("attention", {"nheads": 2}),
    "rotary": ("attention", {"nheads": 4, "kv_heads": 2, "rotary_dim": 2, "d_conv": 3, "mlp_dim": 4}),
    "window": ("attention", {"nheads": 2, "window": 3, "rotary_dim": 4}),
}


def path_to(node: int) -> list[int]:
    return [] if node < 0 else [*path_to(PARENT[node]), node]


def same_state(got, expected, row: int) -> None:
    """Equal in what steps can see: slots of attention behind the last position are free."""
    for one, other in zip(_pytree.tree_leaves(got), _pytree.tree_leaves(expected)):
        if one.dim() == 4 and one.shape != other.shape:  # keys and values that grow
            slots = min(one.shape[2], other.shape[2])
            one, other = one[:, :, :slots], other[:, :, :slots]
        torch.testing.assert_close(one[row], other[0], rtol=1e-10, atol=1e-10)


def check_paths(model, x, state, alone) -> None:
    """`alone` gives the state of one row."""
    tree = token_tree(PARENT)
    y, draft = model.verify(x, state, tree)
    for node in range(-1, tree.size):
        path = path_to(node)
        after = accept(draft, [node, node])
        for row in range(2):
            expected, last = None, alone(row)
            for place in path:
                expected, last = model.step(x[row : row + 1, place], last)
            if path:
                torch.testing.assert_close(y[row, node], expected[0], rtol=1e-10, atol=1e-10)
            same_state(after, last, row)
    mixed = accept(draft, [4, 6])  # paths of different lengths, then on from there
    for row, node in enumerate((4, 6)):
        last = alone(row)
        for place in path_to(node):
            _, last = model.step(x[row : row + 1, place], last)
        expected, _ = model.step(x[row : row + 1, 0], last)
        torch.testing.assert_close(model.step(x[:, 0], mixed)[0][row], expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("before", [0, 2, 7])
def test_mixers(name, before):
    torch.manual_seed(0)
    kind, options = MIXERS[name]
    mixer = create_mixer(kind, 8, **options, **DOUBLE).requires_grad_(False)
    past, x = torch.randn(2, before, 8, **DOUBLE), torch.randn(2, len(PARENT), 8, **DOUBLE)
    _, state = mixer.prefill(past, mixer.init_state(2))
    check_paths(mixer, x, state, lambda row: mixer.prefill(past[row : row + 1], mixer.init_state(1))[1])


@pytest.mark.parametrize("slots", [None, 40])
def test_models_with_rows_at_different_positions(slots):
    torch.manual_seed(0)
    options = {"mamba2": {"headdim": 8, "d_state": 4}, "attention": {"nheads": 2, "rotary_dim": 4}}
    pair = {"mixer": ["mamba2", "attention"], "merge": "norm_mean"}
    model = SequenceModel(8, ["mamba2", "attention", pair], vocab_size=11, mixer_options=options, **DOUBLE)
    model.requires_grad_(False)
    past, ids = torch.randint(11, (2, 6)), torch.randint(11, (2, len(PARENT)))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    _, state = model.prefill(past, allocate(model, 2, slots=slots), mask=mask)

    def alone(row):
        return model.prefill(past[row : row + 1, mask[row]], allocate(model, 1, slots=slots))[1]

    check_paths(model, ids, state, alone)
    logits, draft = verify(model, ids, state, token_tree([PARENT, list(range(-1, len(PARENT) - 1))]))
    plain, _ = model.prefill(ids[1:], alone(1))
    torch.testing.assert_close(logits[1], plain[0], rtol=1e-10, atol=1e-10)
    assert accept(draft, [-1, 8]).position.tolist() == [6, 13]


def test_16_bit_models_keep_their_dtypes():
    torch.manual_seed(0)
    options = {"mamba2": {"headdim": 8, "d_state": 4}, "attention": {"nheads": 2}}
    model = SequenceModel(8, "m1t1", vocab_size=11, mixer_options=options, dtype=torch.bfloat16).requires_grad_(False)
    _, state = model.prefill(torch.randint(11, (2, 6)))
    logits, draft = model.verify(torch.randint(11, (2, 3)), state, token_tree([-1, 0, 0]))
    assert logits.dtype == torch.bfloat16
    kinds = [tensor.dtype for tensor in _pytree.tree_leaves(accept(draft, [1, 2]))]
    assert kinds == [tensor.dtype for tensor in _pytree.tree_leaves(state)]


def test_bad_input():
    stack = Stack(8, "m1x1", mixer_options={"headdim": 8, "d_state": 4})
    with pytest.raises(TypeError, match=r"layer 1 \(Mamba3\) takes no trees"):
        verify(stack, torch.zeros(1, 1, 8), stack.init_state(1), token_tree([-1]))
    with pytest.raises(TypeError, match="Linear takes no trees"):
        verify(torch.nn.Linear(2, 2), torch.zeros(1, 1, 2), None, token_tree([-1]))
    stack = Stack(8, "m1", mixer_options={"headdim": 8, "d_state": 4})
    _, draft = verify(stack, torch.zeros(2, 1, 8), stack.init_state(2), token_tree([-1]))
    for node, error, match in (
        ([0, 1], ValueError, "must lie in -1 to 0"),
        ([0], ValueError, "one per row"),
        ([0.0, 0.0], TypeError, "must be of integers"),
    ):
        with pytest.raises(error, match=match):
            accept(draft, node)
    pair = DoubleMixer(8, create_mixer("mamba2", 8, headdim=8), create_mixer("hydra", 8, headdim=8))
    with pytest.raises(TypeError, match="sees both directions"):
        pair.verify(torch.zeros(1, 1, 8), None, token_tree([-1]))
