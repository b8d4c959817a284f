"""Routers: where chunks begin.

    q_t = W_q e_t,    k_t = W_k e_t
    p_t = (1 - cos(q_{t-1}, k_t)) / 2,    p_t = 1 where a sequence begins
    a chunk begins at t if p_t > 1/2

Hwang, Wang & Gu (2025), equation (4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from ..states import NestedState
from .boundaries import Boundaries


@dataclass(frozen=True, eq=False)
class RouterState(NestedState):
    """What a router remembers.

    Attributes:
        last: The last real vector, (b, d); of routers that count, the number of positions, (b, 1).
        seen: Whether there was one, (b,) bool.
    """

    last: Tensor
    seen: Tensor


register_dataclass(RouterState, serialized_type_name=f"{RouterState.__module__}.{RouterState.__qualname__}")


class Router(nn.Module):
    """A chunk begins where neighbouring vectors differ.

    Args:
        d_model: Width.
        fp32: Compute in float32 also where the input or autocast is narrower. Published weights were trained without;
            near p = 1/2 a few boundaries may then differ.
        device: Where to create the weights.
        dtype: Their dtype.
    """

    def __init__(
        self,
        d_model: int,
        *,
        fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.fp32 = fp32
        self.q_proj_layer = nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)
        self.k_proj_layer = nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both maps to the identity: at first a chunk begins where neighbours point in different directions."""
        for layer in (self.q_proj_layer, self.k_proj_layer):
            nn.init.eye_(layer.weight)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Boundaries:
        """Boundaries of whole sequences (b, l, d); `mask` and `seq_idx` as for mixers."""
        if not x.shape[1]:
            return self.prefill(x, mask=mask, seq_idx=seq_idx)[0]
        prob = F.pad(self._prob(x[:, :-1], x[:, 1:]), (1, 0), value=1.0)
        begins = None if mask is None else F.pad(mask[:, 1:] & ~mask[:, :-1], (1, 0))
        if seq_idx is not None:
            changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
            begins = changes if begins is None else begins | changes
        return _decide(prob if begins is None else torch.where(begins, 1.0, prob), mask)

    def prefill(
        self,
        x: Tensor,
        state: RouterState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Boundaries, RouterState]:
        """Like `forward`, continuing from a state. A row may be padding throughout; its state then stays."""
        state = state or self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        first, last = _real_ends(x, mask)
        before = torch.cat([state.last[:, None].to(x.dtype), x[:, :-1]], dim=1)
        if mask is not None:  # what stands before the first real position is padding
            before = torch.where(first[..., None], state.last[:, None].to(x.dtype), before)
        prob = self._prob(before, x)
        begins = first & ~state.seen[:, None]
        if seq_idx is not None:
            begins = begins | F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        after = RouterState(_at(x, last, state.last), state.seen | (last >= 0))
        return _decide(torch.where(begins, 1.0, prob), mask), after

    def step(self, x: Tensor, state: RouterState) -> tuple[Boundaries, RouterState]:
        """One position (b, d); the boundaries' tensors are (b,)."""
        prob = torch.where(state.seen, self._prob(state.last.to(x.dtype), x), 1.0)
        return _decide(prob, None), RouterState(x.to(state.last.dtype), torch.ones_like(state.seen))

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RouterState:
        """State before the first position."""
        weight = self.q_proj_layer.weight
        device = device or weight.device
        last = torch.zeros(batch, self.d_model, device=device, dtype=dtype or weight.dtype)
        return RouterState(last, torch.zeros(batch, device=device, dtype=torch.bool))

    def _prob(self, before: Tensor, x: Tensor) -> Tensor:
        """(1 - cos(W_q before, W_k x)) / 2 over the last dimension."""
        if self.fp32:
            dtype = torch.promote_types(x.dtype, torch.float32)
            with torch.autocast(x.device.type, enabled=False):
                q = F.linear(before.to(dtype), self.q_proj_layer.weight.to(dtype))
                k = F.linear(x.to(dtype), self.k_proj_layer.weight.to(dtype))
                cos = (F.normalize(q, dim=-1) * F.normalize(k, dim=-1)).sum(-1)
        else:
            q = F.normalize(self.q_proj_layer(before.to(self.q_proj_layer.weight.dtype)), dim=-1)
            k = F.normalize(self.k_proj_layer(x.to(self.k_proj_layer.weight.dtype)), dim=-1)
            cos = (q * k).sum(-1)
        prob = ((1 - cos) / 2).clamp(0, 1)
        return prob.to(torch.promote_types(prob.dtype, torch.float32))


class FixedRouter(nn.Module):
    """A chunk begins at every n-th position, whatever stands there: the baseline without a learned router.

    Args:
        n: Positions per chunk.
        offset: Position of the first boundary after the start of a sequence, which is always one.

    Raises:
        ValueError: if n is below 1.
    """

    def __init__(self, n: int, offset: int = 0) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"a chunk has at least 1 position, got n={n}.")
        self.n, self.offset = n, offset

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Boundaries:
        """Boundaries of whole sequences (b, l, d)."""
        return self.prefill(x, mask=mask, seq_idx=seq_idx)[0]

    def prefill(
        self,
        x: Tensor,
        state: RouterState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Boundaries, RouterState]:
        """Like `forward`, counting on from a state."""
        state = state or self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        count = state.last.long() + real.cumsum(1) - 1  # position in the row's sequence, (b, l)
        if seq_idx is not None:
            starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
            begin = torch.where(starts, count, 0).cummax(1).values
            count = count - begin
        number = count[:, -1:] + 1 if x.shape[1] else state.last
        after = RouterState(number.to(state.last.dtype), state.seen | real.any(1))
        return _decide(self._chosen(count).to(_wide(x)), mask), after

    def step(self, x: Tensor, state: RouterState) -> tuple[Boundaries, RouterState]:
        """One position (b, d)."""
        chosen = self._chosen(state.last[:, 0].long())
        return _decide(chosen.to(_wide(x)), None), RouterState(state.last + 1, torch.ones_like(state.seen))

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RouterState:
        """State before the first position; counts are int64 whatever the dtype."""
        last = torch.zeros(batch, 1, device=device, dtype=torch.int64)
        return RouterState(last, torch.zeros(batch, device=device, dtype=torch.bool))

    def _chosen(self, position: Tensor) -> Tensor:
        return (position == 0) | ((position - self.offset) % self.n == 0)


class RandomRouter(FixedRouter):
    """A chunk begins at positions drawn at random, the same for every sequence: how much does the place matter?

    Args:
        rate: Share of positions that begin a chunk, in (0, 1].
        seed: Base of the draw; position and seed alone decide.

    Raises:
        ValueError: if the rate is out of range.
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        super().__init__(1)
        if not 0 < rate <= 1:
            raise ValueError(f"a rate is a share in (0, 1], got {rate}.")
        self.rate, self.seed = rate, seed

    def _chosen(self, position: Tensor) -> Tensor:
        mixed = (position + 1) * 0x9E3779B1 + self.seed * 0x85EBCA77
        for factor in (0x85EBCA6B, 0xC2B2AE35):  # finaliser of a 32-bit hash, in int64
            mixed = ((mixed ^ ((mixed & 0xFFFFFFFF) >> 15)) * factor) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 16)
        return (position == 0) | (mixed < int(self.rate * 2**32))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _decide(prob: Tensor, mask: Tensor | None) -> Boundaries:
    chosen = prob > 0.5
    if mask is not None:
        chosen = chosen & mask
    return Boundaries(prob, chosen, torch.where(chosen, prob, 1 - prob), mask)


def _real_ends(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether a position is the first real one of its row, (b, l), and the index of the last real one (-1: none)."""
    batch, length = x.shape[:2]
    positions = torch.arange(length, device=x.device)
    if mask is None or not length:
        return (positions == 0).expand(batch, length), positions.new_full((batch,), length - 1)
    first = mask & (mask.cumsum(1) == 1)
    return first, torch.where(mask, positions, -1).amax(1)


def _at(x: Tensor, index: Tensor, otherwise: Tensor) -> Tensor:
    """Vector at one position of each row, (b, d); `otherwise` where the index is -1."""
    if not x.shape[1]:
        return otherwise
    found: Any = x.gather(1, index.clamp(min=0)[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
    return torch.where((index >= 0)[:, None], found.to(otherwise.dtype), otherwise)
