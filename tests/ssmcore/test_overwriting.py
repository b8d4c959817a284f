"""Steps that keep one copy of a state give what steps on values give."""

import pytest
import torch
from torch.utils import _pytree

from omnissm.kernels import overwrite_states
from omnissm.ssmcore import SequenceModel, create_mixer
from omnissm.ssmcore.cache import copy_state_

WRITTEN = dict.fromkeys(("mamba", "mamba2", "discrete_mamba2"), ("conv", "ssm")) | {"mamba3": ("phi", "ssm")}


@pytest.mark.parametrize("name", [*WRITTEN, "attention", "s4d"])
def test_step_of_each_mixer(name):
    torch.manual_seed(0)
    mixer = create_mixer(name, 64).double()
    x = torch.randn(3, 5, 64, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer.prefill(x[:, :4])
        expected, after = mixer.step(x[:, 4], state)
        kept = _pytree.tree_map(torch.clone, state)
        with overwrite_states():
            y, found = mixer.step(x[:, 4], kept)
    torch.testing.assert_close(y, expected)
    for part, value in zip(_pytree.tree_leaves(after), _pytree.tree_leaves(found)):
        torch.testing.assert_close(part, value)
    for field in WRITTEN.get(name, ()):
        assert getattr(found, field) is getattr(kept, field)


def test_a_model_goes_on_in_place():
    torch.manual_seed(0)
    model = SequenceModel(64, "m1x1t1m1", vocab_size=7).double()
    symbols = torch.randint(7, (4, 2))
    with torch.no_grad():
        state = model.init_state(2)
        kept = _pytree.tree_map(torch.clone, state)
        for symbol in symbols:
            expected, state = model.step(symbol, state)
            with overwrite_states():
                logits, after = model.step(symbol, kept)
            if len(_pytree.tree_leaves(after)) == len(_pytree.tree_leaves(kept)):
                kept = after
            torch.testing.assert_close(logits, expected)


def test_copying_a_state_onto_itself_is_nothing():
    model = SequenceModel(64, "m2", vocab_size=7)
    state = model.init_state(2)
    before = _pytree.tree_map(torch.clone, state)
    copy_state_(state, state)
    for one, other in zip(_pytree.tree_leaves(state), _pytree.tree_leaves(before)):
        assert torch.equal(one, other)
