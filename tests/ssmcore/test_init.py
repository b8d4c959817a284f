"""Initial values and marks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omnissm.ssmcore.init import a_log_init, dt_bias_init, inverse_softplus, no_weight_decay, residual_init_


@pytest.mark.parametrize(
    ("dt", "bias"), [(1e-4, -9.210290372), (1e-3, -6.907255237), (1e-2, -4.600166019), (0.1, -2.252168461)]
)
def test_inverse_softplus(dt, bias):
    assert inverse_softplus(torch.tensor(dt, dtype=torch.float64)).item() == pytest.approx(bias, abs=1e-9)


def test_dt_bias_is_log_uniform():
    bias = dt_bias_init((100, 200), 1e-3, 1e-1, dtype=torch.float64)
    log = F.softplus(bias).log10()
    assert -3 - 1e-9 <= log.min() < -2.99
    assert -1.01 < log.max() <= -1 + 1e-9
    quarters = torch.histc(log, bins=4, min=-3, max=-1) / log.numel()
    assert (quarters - 0.25).abs().max() < 0.02


def test_dt_floor_and_bad_range():
    assert torch.allclose(F.softplus(dt_bias_init(5, 1e-6, 1e-5)), torch.full((5,), 1e-4))
    with pytest.raises(ValueError, match=r"0 < dt_min <= dt_max, got dt_min=0\.1, dt_max=0\.01"):
        dt_bias_init(5, 0.1, 0.01)


def test_a_log():
    assert torch.allclose(a_log_init(2, 3, 4).exp(), torch.arange(1.0, 5.0).expand(2, 3, 4))


def test_marks():
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    no_weight_decay(one)
    assert one._no_weight_decay
    assert one._no_reinit
    assert not hasattr(two, "_no_weight_decay")


def test_residual_init_scales_once():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj, self.out_proj = nn.Linear(64, 64), nn.Linear(64, 64)

    block = Block()
    before = block.in_proj.weight.clone()
    for _ in range(2):
        residual_init_(block, 16)
    assert torch.equal(block.in_proj.weight, before)
    bound = 1 / math.sqrt(64) / 4  # kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(fan_in)
    assert 0.95 * bound < block.out_proj.weight.abs().max() <= bound
    with pytest.raises(ValueError, match="n_residual of at least 1"):
        residual_init_(block, 0)
