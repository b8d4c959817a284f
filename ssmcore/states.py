"""States made of the states of several layers: one value that is kept, copied, selected from and saved as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree

from .mixers.common import MixerState


class NestedState:
    """Base of frozen dataclasses whose fields are tensors (batch in front), states, or tuples of states.

    It has the methods of `MixerState`.
    """

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move it; a dtype is that of the activations, and recurrent states are kept in at least float32."""
        return self._map(
            lambda tensor: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None),
            lambda state: state.to(device=device, dtype=dtype),
        )

    def detach(self) -> Self:
        """Cut it off the graph, as between pieces of truncated backpropagation."""
        return self._map(lambda tensor: tensor.detach(), lambda state: state.detach())

    def select(self, index: Tensor) -> Self:
        """Rows `index` (integers, repeats allowed) of the batch: beam search, dropping rows, copying a prompt."""
        return self._map(lambda tensor: tensor.index_select(0, index), lambda state: state.select(index))

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return int(_pytree.tree_leaves(self)[0].shape[0])

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in _pytree.tree_leaves(self))

    def _map(self, on_tensor: Callable[[Tensor], Tensor], on_state: Callable[[Any], Any]) -> Self:
        def mapped(part: Any) -> Any:
            if isinstance(part, Tensor):
                return on_tensor(part)
            if isinstance(part, tuple):
                return tuple(mapped(one) for one in part)
            return on_state(part)

        return replace(self, **{f.name: mapped(getattr(self, f.name)) for f in fields(self)})  # type: ignore[type-var, arg-type]


@dataclass(frozen=True, eq=False)
class StackState(NestedState):
    """State of a `Stack`.

    Attributes:
        layers: State of each layer's mixer.
        position: Real tokens so far in each row's present sequence, (b,) int64.
    """

    layers: tuple[Any, ...]
    position: Tensor


@dataclass(frozen=True, eq=False)
class PairState(NestedState):
    """State of two mixers side by side.

    Attributes:
        first: State of the first.
        second: State of the second.
    """

    first: Any
    second: Any


for _kind in (StackState, PairState):
    _pytree.register_dataclass(_kind, serialized_type_name=f"{_kind.__module__}.{_kind.__qualname__}")

State = MixerState | NestedState
