"""A stack small enough to check by hand, with the contract that `Hierarchy` asks of stacks."""

import torch
import torch.nn.functional as F
from torch import nn

from omnissm.kernels import ema_scan


class Smoother(nn.Module):
    """y = x W + moving average of x, one linear map and one state per channel."""

    causal = True

    def __init__(self, d_model, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.d_model = d_model
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight.copy_(torch.randn(d_model, d_model, generator=generator) / d_model**0.5)

    def forward(self, x, *, mask=None, seq_idx=None):
        return self.prefill(x, mask=mask, seq_idx=seq_idx)[0]

    def prefill(self, x, state=None, *, mask=None, seq_idx=None, reset=None):
        if reset is not None:
            starts = reset if seq_idx is None else reset | F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
            seq_idx = starts.cumsum(1, dtype=torch.int32)
            state = None if state is None else state * ~reset[:, :1].any(1, keepdim=True)
        weight = torch.full(x.shape[:2], 0.3, dtype=x.dtype)
        if mask is not None:
            weight, x = weight * mask, x * mask[..., None]
        mean, state = ema_scan(x, weight, state, seq_idx=seq_idx)
        y = torch.tanh(self.out_proj(x)) + mean
        return (y if mask is None else y * mask[..., None]), state

    def step(self, x, state):
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def init_state(self, batch, *, device=None, dtype=None):
        return torch.zeros(batch, self.d_model, dtype=dtype)
