"""HiSS: a stack over short chunks of a fast signal, and a stack over what it makes of each chunk.

Bhirangi et al. (2024), "Hierarchical State Space Models for Continuous Sequence-to-Sequence Modeling". For chunks whose
borders are learned see `omnissm.ssmcore.chunking`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Stack


class HierarchicalStack(nn.Module):
    """(b, l, d_model) -> (b, ceil(l / chunk), d_high): one output for every chunk of positions.

    The low stack runs on every chunk from an empty state, and its last output stands for the chunk. With causal mixers
    an output depends on positions up to the end of its chunk alone. A length that chunks do not divide is filled
    up with zeros in front, so that the last output always is that after the last position.

    Args:
        d_model: Width of the input.
        chunk: Positions per chunk.
        low: Layers of the stack inside chunks, as for `Stack`.
        high: Layers of the stack over chunks.
        d_low: Width of the low stack.
        d_high: Width of the high stack and of the output.
        mixer_options: Options of the mixers, as for `Stack`.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if the chunk is empty or a stack cannot be built.
    """

    def __init__(
        self,
        d_model: int,
        *,
        chunk: int = 10,
        low: str | int | Sequence[Any] = "m2",
        high: str | int | Sequence[Any] = "m4",
        d_low: int = 64,
        d_high: int = 64,
        mixer_options: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"`chunk` must be at least 1, got {chunk}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.chunk = d_model, chunk
        self.in_proj = nn.Linear(d_model, d_low, **factory)
        self.low = Stack(d_low, low, mixer_options=mixer_options, **factory)
        self.lift = nn.Linear(d_low, d_high, **factory)
        self.high = Stack(d_high, high, mixer_options=mixer_options, **factory)

    @property
    def causal(self) -> bool:
        """Whether no output depends on later chunks."""
        return self.high.causal

    def forward(self, x: Tensor) -> Tensor:
        """Run both levels.

        Args:
            x: (b, l, d_model).

        Returns:
            (b, ceil(l / chunk), d_high).

        Raises:
            ValueError: if the shape is wrong.
        """
        return self.high(self.features(x))

    def prefill(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Like `forward` on whole chunks, going on from the state of the high stack and returning the one after.

        Raises:
            ValueError: if the shape is wrong or the length no multiple of `chunk`.
            TypeError: if a mixer of the high stack sees both directions.
        """
        if x.dim() == 3 and x.shape[1] % self.chunk:
            raise ValueError(f"expected whole chunks of {self.chunk} positions, got {x.shape[1]} positions.")
        return self.high.prefill(self.features(x), state)

    def features(self, x: Tensor) -> Tensor:
        """What the high stack reads, (b, ceil(l / chunk), d_high)."""
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"`x` must be (b, l, {self.d_model}), got shape {tuple(x.shape)}.")
        batch, length, _ = x.shape
        x = F.pad(x, (0, 0, -length % self.chunk, 0))
        chunks = self.in_proj(x).reshape(-1, self.chunk, self.in_proj.out_features)
        last = self.low(chunks)[:, -1]
        return self.lift(last.to(self.lift.weight.dtype)).reshape(batch, -1, self.lift.out_features)
