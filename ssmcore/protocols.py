"""What a mixer of each family offers. Structural types: a class need not inherit from them.

Sizes: b batch, l length, i and j rows and columns of a grid (in time series variates and time), v nodes, d channels.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class SequenceMixer(Protocol):
    """Maps (b, l, d) to itself."""

    causal: ClassVar[bool]

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences; `mask` (b, l) is True for real tokens, `seq_idx` (b, l) numbers packed sequences."""
        ...


@runtime_checkable
class CausalMixer(SequenceMixer, Protocol):
    """A sequence mixer that can continue: state is an argument and a result, never a hidden attribute."""

    def prefill(
        self,
        x: Tensor,
        state: Any | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Like `forward`, from `state`, also returning the state after the last position."""
        ...

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One position, (b, d)."""
        ...


@runtime_checkable
class GridMixer(Protocol):
    """Maps (b, i, j, d) to itself; `causal` means that no output depends on a later column j."""

    causal: ClassVar[bool]

    def forward(self, x: Tensor, *, mask: Tensor | None = None, time_gap: Tensor | None = None) -> Tensor:
        """Mix a grid; `mask` (b, i, j): True where observed; `time_gap` (b, j): time since the column before."""
        ...


@runtime_checkable
class GraphMixer(Protocol):
    """Maps node features (v, d) to themselves, given a batch of graphs."""

    def forward(self, x: Tensor, graph: Any) -> Tensor:
        """Mix along the edges of `graph`."""
        ...
