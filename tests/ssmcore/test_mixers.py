"""Mixers by name, and the contract of grid mixers."""

import pytest
import torch
from torch import nn

from omnissm.ssmcore import create_mixer
from omnissm.ssmcore.mixers import MIXERS, mixer_options
from omnissm.ssmcore.protocols import CausalMixer, GridMixer, SequenceMixer
from omnissm.ssmcore.testing import GRID_CHECKS, check_causal, check_gradients, check_mask

GRID_MIXERS = [name for name, mixer in MIXERS.items() if hasattr(mixer, "causal") and not hasattr(mixer, "state_type")]


@pytest.mark.parametrize("check", GRID_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", GRID_MIXERS)
def test_contract(name, check, device):
    check(create_mixer(name, 8, device=device))


@pytest.mark.parametrize("name", GRID_MIXERS)
def test_protocol(name):
    mixer = create_mixer(name, 8)
    assert isinstance(mixer, GridMixer)
    assert not isinstance(nn.Linear(2, 2), GridMixer | SequenceMixer | CausalMixer)


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"Unknown mixer 'chimera2'\. Did you mean 'chimera2d'\?"):
        create_mixer("chimera2", 8)
    with pytest.raises(
        TypeError,
        match=r"Mixer 'chimera2d' has no option 'd_sate'\. Did you mean 'd_state'\? It takes d_state, d_conv, heads",
    ):
        create_mixer("chimera2d", 8, d_sate=4)


def test_options_with_their_defaults():
    options = mixer_options("hydra", d_state=16)
    assert options["d_state"] == 16
    assert options["d_conv"] == 7
    assert not {"device", "dtype", "d_model"} & set(options)
    with pytest.raises(TypeError, match="no option 'rank'"):
        mixer_options("hydra", rank=2)


class Broken(nn.Module):
    """A mixer that looks one column ahead, ignores a parameter and reads masked cells."""

    causal = True

    def __init__(self):
        super().__init__()
        self.d_model = 4
        self.used, self.unused = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x, *, mask=None, time_gap=None):
        return (x + x.roll(-1, 2)) * self.used


@pytest.mark.parametrize(
    ("check", "reason"),
    [(check_causal, "depend on later columns"), (check_gradients, "`unused` gets no"), (check_mask, "reaches other")],
)
def test_the_contract_can_fail(check, reason):
    with pytest.raises(AssertionError, match=reason):
        check(Broken())
