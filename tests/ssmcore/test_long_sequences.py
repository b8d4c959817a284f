"""Numerics of mixers over 131,072 positions, from steps of nothing to steps that forget everything."""

import copy

import pytest
import torch

from omnissm.kernels.testing import relative_error
from omnissm.ssmcore import create_mixer

OPTIONS = {
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 4, "headdim": 4},
    "mamba3": {"d_state": 4, "headdim": 4},
    "discrete_mamba2": {"d_state": 4, "nheads": 2},
    "hydra": {"d_state": 4, "headdim": 4},
    "s4d": {"d_state": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_float32_is_float64(name):
    torch.manual_seed(0)
    mixer = create_mixer(name, 8, **OPTIONS[name]).requires_grad_(False)
    parameters = dict(mixer.named_parameters())
    for key in ("dt_bias", "dt_proj.bias"):
        if key in parameters:  # steps from 1e-13 to 10
            parameters[key].copy_(torch.linspace(-30, 10, parameters[key].numel()))
    if "A_log" in parameters:
        A_log = parameters["A_log"]
        A_log += torch.linspace(-4, 6, A_log.shape[0]).unflatten(0, (-1, *[1] * (A_log.dim() - 1)))
    x = torch.randn(1, 131072, 8)
    y = mixer(x)
    assert y.isfinite().all()
    assert relative_error(y, copy.deepcopy(mixer).double()(x.double())) < 1e-5
