"""Gated memory unit: a layer without memory of its own that reads what an earlier layer has mixed.

    y = out_proj(norm(m) * silu(in_proj(x))),       m_t the output of an earlier layer's mixer at the same position

Ren et al. (2025), "Decoder-Hybrid-Decoder Architecture for Efficient Reasoning with Long Generation" (SambaY).
Decoding such a layer costs two linear maps and no state. The published model reads the scan of a Mamba layer before its
gate; here it is the output of any mixer, so that every mixer can be read.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import MixerState, Mode, check_input, lay_out, linear_flops, mixer_state, total_flops, wide


@mixer_state
class NoState(MixerState):
    """State of a layer that has none: a tensor (b, 0), which knows the batch."""

    nothing: Tensor


class GatedMemoryUnit(nn.Module):
    """Position-wise layer over the stream and the memory of an earlier layer; `Stack` hands the memory in.

    Args:
        d_model: Width of the stream and of the memory.
        reads: The layer of the stack to read, counted from 0; None: the nearest earlier one that is neither attention
            nor a unit like this, or where there is none the nearest that is no such unit.
        norm: Norm the memory by its root mean square, with a learned weight.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if `reads` is negative.
    """

    def __init__(
        self,
        d_model: int,
        *,
        reads: int | None = None,
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reads is not None and reads < 0:
            raise ValueError(f"`reads` is a layer counted from 0, got {reads}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.reads = d_model, reads
        self.causal, self.varlen, self.linear_in_x = True, True, False
        self.in_proj = nn.Linear(d_model, d_model, bias=False, **factory)
        self.norm_weight = nn.Parameter(torch.ones(d_model, **factory)) if norm else None
        self.out_proj = nn.Linear(d_model, d_model, bias=False, **factory)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return () if self.norm_weight is None else ("norm_weight",)

    def forward(
        self, x: Tensor, *, memory: Tensor | None = None, mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:
        """Read the memory.

        Args:
            x: (b, l, d).
            memory: Output of the layer that is read, (b, l, d).
            mask: True at real tokens, (b, l); outputs elsewhere are 0.
            seq_idx: Numbers of packed sequences; positions do not see each other here anyway.

        Raises:
            ValueError: if a shape is wrong or there is no memory.
        """
        check_input(x, self.d_model)
        return lay_out(x, mask, seq_idx, align=False).restore(self._read(x, memory))

    def prefill(
        self,
        x: Tensor,
        state: NoState | None = None,
        *,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, NoState]:
        """Like `forward`; the state holds nothing and `reset` changes nothing."""
        y = self.forward(x, memory=memory, mask=mask, seq_idx=seq_idx)
        return y, self.init_state(x.shape[0], device=x.device, dtype=x.dtype)

    def step(self, x: Tensor, state: NoState, *, memory: Tensor | None = None) -> tuple[Tensor, NoState]:
        """One position, x and memory (b, d)."""
        check_input(x, self.d_model, "b")
        return self._read(x, memory), state

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NoState:
        """State before the first position: nothing."""
        like = self.in_proj.weight
        return NoState(torch.zeros(batch, 0, device=device or like.device, dtype=dtype or like.dtype))

    def mixing_matrix(self, x: Tensor, *, state: NoState | None = None) -> NoReturn:
        """Not of this layer.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("GatedMemoryUnit mixes no positions; ask the layer that it reads.")

    def flops(self, l: int, *, mode: Mode = "prefill") -> int:  # noqa: E741
        """Operations of one sequence of length l, or of one position ("decode")."""
        positions = 1 if mode == "decode" else l
        return total_flops({"projections": positions * linear_flops(self.in_proj, self.out_proj)}, mode)

    def state_numel(self) -> int:
        """There is no state: 0."""
        return 0

    def _read(self, x: Tensor, memory: Tensor | None) -> Tensor:
        if memory is None or memory.shape != x.shape:
            got = "none" if memory is None else f"shape {tuple(memory.shape)}"
            raise ValueError(
                f"`memory` must be an earlier layer's output, {tuple(x.shape)} like `x`, got {got}; "
                "a Stack hands it in."
            )
        if self.norm_weight is not None:
            memory = F.rms_norm(wide(memory), (self.d_model,), wide(self.norm_weight), 1e-5).to(memory.dtype)
        return self.out_proj(memory.to(x.dtype) * F.silu(self.in_proj(x)))
