"""States of models: made, filled in pieces, written over, saved and read."""

import pytest
import torch
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from omnissm.ssmcore import SequenceModel
from omnissm.ssmcore.cache import allocate, copy_state_, load_state, prefill, save_state
from omnissm.ssmcore.mixers import create_mixer

LAYERS = [
    {"mixer": "mamba2", "d_state": 8, "headdim": 4},
    {"mixer": "attention", "nheads": 2, "rotary_dim": 4},
    {"mixer": [{"mixer": "s4d", "d_state": 4}, {"mixer": "attention", "nheads": 2, "window": 3}], "mlp": True},
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SequenceModel(8, LAYERS, vocab_size=11, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 3, 7, 20, None])
def test_pieces_do_not_matter(model, size):
    ids = torch.randint(11, (2, 13))
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, :4] = mask[1, 9:] = False
    expected, last = model.prefill(ids, mask=mask)
    got, state = prefill(model, ids, chunk_size=size, mask=mask)
    torch.testing.assert_close(got[mask], expected[mask])
    more = torch.randint(11, (2,))
    torch.testing.assert_close(model.step(more, state)[0], model.step(more, last)[0])


def test_fixed_memory_is_written_over(model):
    ids = torch.randint(11, (2, 6))
    state = allocate(model, 2, slots=6)
    pointers = [leaf.data_ptr() for leaf in pytree.tree_leaves(state)]
    outputs = []
    for symbols in ids.unbind(1):
        logits, after = model.step(symbols, state)
        copy_state_(state, after)
        outputs.append(logits)
    assert [leaf.data_ptr() for leaf in pytree.tree_leaves(state)] == pointers
    torch.testing.assert_close(torch.stack(outputs, 1), model(ids))
    growing = allocate(model, 2)
    with pytest.raises(ValueError, match=r"`layers.1.k` is \(2, 2, 1, 4\).*states that grow cannot be written over"):
        copy_state_(growing, model.step(ids[:, 0], growing)[1])
    with pytest.raises(ValueError, match="the states are of different models: conv"):
        copy_state_(create_mixer("s4d", 8).init_state(1), create_mixer("mamba2", 8, headdim=4).init_state(1))


def test_a_state_is_a_file(model, tmp_path):
    ids, more = torch.randint(11, (3, 5)), torch.randint(11, (3,))
    for state in (model.prefill(ids)[1], model.prefill(ids, allocate(model, 3, slots=9))[1]):
        save_state(state, tmp_path / "state.safetensors")
        again = load_state(tmp_path / "state.safetensors")
        assert pytree.tree_structure(again) == pytree.tree_structure(state)
        assert torch.equal(model.step(more, again)[0], model.step(more, state)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    alone = create_mixer("mamba2", 8, headdim=4).init_state(2)
    save_state(alone, tmp_path / "mixer.safetensors")
    assert torch.equal(load_state(tmp_path / "mixer.safetensors").ssm, alone.ssm)


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no state at"):
        load_state(tmp_path / "none")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no state"):
        load_state(tmp_path / "weights.safetensors")
    for kind in ("ssmcore.cache.save_state", "os.system", "ssmcore.blocks.Stack"):
        metadata = {"format": "omnissm-state-1", "types": f'{{"type": "{kind}", "fields": {{}}}}'}
        save_file({"a": torch.ones(1)}, tmp_path / "forged", metadata=metadata)
        with pytest.raises(ValueError, match="which is no state of"):
            load_state(tmp_path / "forged")
    with pytest.raises(TypeError, match="got dict"):
        save_state({}, tmp_path / "x")
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1"):
        prefill(create_mixer("s4d", 8), torch.zeros(1, 3, 8), chunk_size=0)
