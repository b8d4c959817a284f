"""Bidirectional: the sum of two passes, sharing, options."""

import copy

import pytest
import torch

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers import Bidirectional
from omnissm.ssmcore.testing import sequence_input

INNER = {"mamba": {"d_state": 3}, "mamba2": {"d_state": 4, "headdim": 4}}


def small(mixer="mamba", **options):
    torch.manual_seed(0)
    return Bidirectional(8, mixer=mixer, mixer_options=INNER[mixer], dtype=torch.float64, **options)


@pytest.mark.parametrize("mixer", INNER)
def test_add_is_the_sum_of_two_passes(mixer):
    both = small(mixer)
    x = sequence_input(both)
    torch.testing.assert_close(both(x), both.ahead(x) + both.back(x.flip(1)).flip(1))
    assert not torch.allclose(both.ahead.in_proj.weight, both.back.in_proj.weight)


def test_concat_and_gate():
    both = small(combine="concat")
    x = sequence_input(both)
    ahead, back = both.ahead(x), both.back(x.flip(1)).flip(1)
    torch.testing.assert_close(both(x), both.join(torch.cat([ahead, back], dim=-1)))
    both = small(combine="gate")
    ahead, back = both.ahead(x), both.back(x.flip(1)).flip(1)
    with torch.no_grad():
        both.gate.weight.zero_()
        both.gate.bias.fill_(60.0)
    torch.testing.assert_close(both(x), ahead)
    torch.nn.init.constant_(both.gate.bias, 0.0)
    torch.testing.assert_close(both(x), (ahead + back) / 2)


def test_one_mixer_for_both_directions_commutes_with_reversal():
    both = small("mamba2", tie="all")
    x = sequence_input(both)
    torch.testing.assert_close(both(x.flip(1)), both(x).flip(1))
    alone = create_mixer("mamba2", 8, **INNER["mamba2"])
    assert sum(p.numel() for p in both.parameters()) == sum(p.numel() for p in alone.parameters())


def test_shared_projections_are_stored_once_and_stay_shared():
    both = small("mamba", tie="projections")
    names = list(both.state_dict())
    assert "ahead.in_proj.weight" in names
    assert "back.x_proj.weight" in names
    assert not {"back.in_proj.weight", "back.out_proj.weight"} & set(names)
    for twin in (both, copy.deepcopy(both), copy.deepcopy(both).float()):
        assert twin.back.in_proj is twin.ahead.in_proj
        assert twin.back.out_proj is twin.ahead.out_proj
    x = sequence_input(both)
    before = both(x)
    both.ahead.in_proj.weight.data[:16] += 0.5
    assert not torch.allclose(both.back(x), small("mamba", tie="projections").back(x))
    assert not torch.allclose(both(x), before)


def test_matrices_lie_side_by_side():
    both = small("mamba2")
    found = both.mixing_matrix(sequence_input(both))
    assert found.matrix.shape[1] == 8
    assert not found.matrix[:, :4].triu(1).any()
    assert not found.matrix[:, 4:].tril(-1).any()


def test_options_are_checked():
    with pytest.raises(ValueError, match="`combine` must be one of 'add', 'concat', 'gate', got 'mean'"):
        small(combine="mean")
    with pytest.raises(ValueError, match="`tie` must be one of"):
        small(tie="some")
    for mixer in ("hydra", "chimera2d"):
        with pytest.raises(TypeError, match="must be a causal sequence mixer"):
            Bidirectional(64, mixer=mixer)
    with pytest.raises(TypeError, match=r"needs a mixer with `in_proj`, 's4d' has none"):
        Bidirectional(64, mixer="s4d", tie="projections")
    with pytest.raises(TypeError, match=r"Bidirectional sees both directions"):
        small().step(torch.zeros(1, 8), None)
