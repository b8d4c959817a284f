"""What a convolution along time hands on to the next call: its last inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def with_inputs_before(x: Tensor, initial_state: Tensor, seq_idx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Put the state (b, c, m) in front of x (b, l, c), as part of each row's first sequence."""
    if seq_idx is not None:
        seq_idx = torch.cat([seq_idx[:, :1].expand(-1, initial_state.shape[2]), seq_idx], dim=1)
    return torch.cat([initial_state.mT.to(x.dtype), x], dim=1), seq_idx


def last_inputs(x: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None, size: int) -> Tensor:
    """The last `size` inputs, (b, c, size), zero where they belong to an earlier sequence than the last one."""
    batch, length, channels = x.shape
    if size == 0:
        return x.new_empty(batch, channels, 0)
    if not torch.compiler.is_compiling():  # compiled code is for any length
        if length >= size and seq_idx is None:
            return x[:, length - size :].mT.contiguous()
        x, seq_idx = x[:, -size:], None if seq_idx is None else seq_idx[:, -size:]
        length = x.shape[1]
    state = x.new_zeros(batch, size, channels) if initial_state is None else initial_state.mT.to(x.dtype)
    state = torch.cat([state, x], dim=1).narrow(1, length, size)
    if seq_idx is not None and length > 0:
        index = torch.cat([seq_idx[:, :1].expand(-1, size), seq_idx], dim=1).narrow(1, length, size)
        state = torch.where((index == seq_idx[:, -1:])[..., None], state, torch.zeros_like(state))
    return state.mT.contiguous()
