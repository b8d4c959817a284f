"""The contract of sequence mixers from one method, for mixers that need no path of their own through it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .common import Layout, MixerState, check_input, check_state, lay_out, recurrence_dtype, require_causal


class RowMixer(nn.Module, ABC):
    """Base class; subclasses set `d_model`, `causal` and `state_type`, and say how rows are mixed."""

    varlen: ClassVar[bool] = True
    state_type: ClassVar[type[MixerState]]
    d_model: int
    causal: bool
    out_proj: nn.Linear

    @abstractmethod
    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the fields of a state."""

    @abstractmethod
    def _mix(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, Any]:
        """Outputs of aligned rows (b, l, d), which are zero at padding, and the state after them if there was one."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        Args:
            x: (b, l, d).
            mask: True at real tokens, (b, l); contiguous in each row.
            seq_idx: Numbers of packed sequences, (b, l), not decreasing.

        Returns:
            (b, l, d), zero at padding.
        """
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx)
        return layout.restore(self._mix(layout.zero_padding(layout.align(x)), None, layout)[0])

    def prefill(
        self,
        x: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Like `forward`, going on from a state and returning the one after the last real token.

        Args:
            x: (b, l, d).
            state: Of the positions before; None: none.
            mask: True at real tokens, (b, l).
            seq_idx: Numbers of packed sequences, (b, l); the state belongs to the first.
            reset: True where the state is dropped first, (b, l).

        Raises:
            TypeError: if the mixer is two-sided or the state of another kind.
            ValueError: if a shape is wrong or the state does not fit.
        """
        require_causal(self)
        check_input(x, self.d_model)
        layout = lay_out(x, mask, seq_idx, reset)
        if state is None:
            state = self.init_state(x.shape[0], device=x.device, dtype=self._dtype(x))
        check_state(state, self.state_type, self._shapes(x.shape[0]), x.device)
        y, state = self._mix(layout.zero_padding(layout.align(x)), state, layout)
        return layout.restore(y), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One position, (b, d).

        Raises:
            ValueError: if a shape is wrong or the state does not fit.
            TypeError: if the mixer is two-sided or the state of another kind.
        """
        require_causal(self)
        check_input(x, self.d_model, "b")
        check_state(state, self.state_type, self._shapes(x.shape[0]), x.device)
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """State before the first position; `dtype` is that of the activations."""
        require_causal(self)
        weight, kind = self._weight(), self.state_type
        device, dtype = device or weight.device, dtype or weight.dtype
        dtypes = dict.fromkeys(kind.recurrent, recurrence_dtype(dtype)) | dict.fromkeys(kind.integral, torch.int64)
        shapes = self._shapes(batch)
        return kind(
            **{name: torch.zeros(shapes[name], device=device, dtype=dtypes.get(name, dtype)) for name in shapes}
        )

    def state_numel(self) -> int:
        """Numbers in the state of one sequence; counts are not among them."""
        held = (shape for name, shape in self._shapes(1).items() if name not in self.state_type.integral)
        return sum(math.prod(shape) for shape in held) if self.causal else 0

    def _weight(self) -> Tensor:
        """The weight whose dtype and device a state takes where none are given."""
        return self.out_proj.weight

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Dtype of the activations that a call keeps in its state."""
        return torch.promote_types(x.dtype, self._weight().dtype)
