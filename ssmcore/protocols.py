"""What a mixer of each family offers. Structural types: a class need not inherit from them.

Sizes: b batch, l length, i and j rows and columns of a grid (in time series variates and time), v nodes, d channels.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class SequenceMixer(Protocol):
    """Maps (b, l, d) to itself; neither residual nor norm inside.

    `mask` (b, l) bool is True at real tokens, contiguous in each row, with padding on either side: padding changes
    nothing anywhere, and outputs there are 0. `seq_idx` (b, l) integers numbers packed sequences, which do not see each
    other. Contracts are checked by `ssmcore.testing.SEQUENCE_CHECKS`.

    Attributes:
        causal: Whether it also is a `CausalMixer`; names alone do not tell, since asking others raises TypeError.
        linear_in_x: Whether `mixing_matrix` works.
        varlen: Whether `seq_idx` is accepted.
        state_type: Type of the state, a `mixers.common.MixerState`; None without one.
    """

    causal: ClassVar[bool]
    linear_in_x: ClassVar[bool]
    varlen: ClassVar[bool]
    state_type: ClassVar[type | None]

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences."""
        ...

    def mixing_matrix(self, x: Tensor, *, state: Any | None = None) -> Any:
        """The linear operator on these inputs, a `mixers.common.MixingMatrix`."""
        ...

    def flops(self, l: int, *, mode: Literal["train", "prefill", "decode"] = "prefill") -> int:  # noqa: E741
        """Multiplications and additions for one sequence of length l, or for one step after l positions ("decode")."""
        ...

    def state_numel(self) -> int:
        """Numbers in the state of one sequence."""
        ...


@runtime_checkable
class CausalMixer(SequenceMixer, Protocol):
    """A sequence mixer that can continue: state is an argument and a result, never a hidden attribute.

    However a sequence is cut into calls of `prefill` and `step`, outputs and the last state are the same.
    """

    def prefill(
        self,
        x: Tensor,
        state: Any | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Like `forward`, from `state`, also returning the state after each row's last real token.

        `state` goes on with the first sequence of a row; `reset` (b, l) bool drops the state before a position.
        """
        ...

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One position, (b, d)."""
        ...

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before the first position."""
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
