"""The mixers by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from .chimera2d import Chimera2D as Chimera2D

__all__ = ["MIXERS", "Chimera2D", "create_mixer"]

MIXERS: dict[str, type[nn.Module]] = {
    "chimera2d": Chimera2D,
}


def create_mixer(name: str, d_model: int, **options: Any) -> nn.Module:
    """Build a mixer by name.

    Args:
        name: A key of `MIXERS`.
        d_model: Width of the stream.
        **options: Keyword arguments of the class.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if the class has no such option; the message lists those it has.
    """
    if name not in MIXERS:
        close = difflib.get_close_matches(name, MIXERS, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"Unknown mixer {name!r}. {hint}Known: {', '.join(sorted(MIXERS))}.")
    mixer = MIXERS[name]
    known = [key for key in inspect.signature(mixer).parameters if key != "d_model"]
    for option in options:
        if option not in known:
            raise TypeError(f"Mixer {name!r} has no option {option!r}; it takes {', '.join(known)}.")
    return mixer(d_model, **options)
