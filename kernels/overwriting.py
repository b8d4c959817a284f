"""Steps that write the new state over the old one, for decoding loops that keep one copy of each state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# A plain module variable, as for backends: torch.compile guards on it.
_overwriting: bool = False


@contextmanager
def overwrite_states() -> Iterator[None]:
    """In this block steps (`ssd_step`, `selective_step`, `conv_step`, ...) change the state they are given.

    They return that state, without a gradient, as their in-place forms do. A model's `step` made of them then reads and
    writes each state once, which is what a recorded CUDA graph wants. Nobody else may hold on to the states.
    """
    global _overwriting
    before, _overwriting = _overwriting, True
    try:
        yield
    finally:
        _overwriting = before


def overwriting() -> bool:
    """Whether this is the inside of `overwrite_states`."""
    return _overwriting
