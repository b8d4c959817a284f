"""Our models by name: timm's `create_model`, for which everything is registered and close names are suggested."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import timm
from torch import nn

from ..ssmcore.training.options import check_kinds
from . import models

_PACKAGE = f"{models.__name__}."


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models of this package that match a shell pattern, e.g. "vim_*"."""
    return sorted(name for name in timm.list_models() if _ours(name) and fnmatch(name, pattern))


def _ours(name: str) -> bool:
    return timm.model_entrypoint(name).__module__.startswith(_PACKAGE)


def create_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """Build a model of this package or of timm.

    Args:
        name: One of `list_models()`, or of `timm.list_models()`.
        pretrained: Load weights; for ours give `pretrained_cfg_overlay={"file": PATH}` with it.
        **options: As `timm.create_model` takes them: `num_classes`, `in_chans`, `features_only`, `img_size`, ...

    Raises:
        ValueError: for an unknown model; the message names close ones.
        TypeError: for an option that the model does not have, or a value of another kind.
    """
    if not timm.is_model(name.partition(".")[0]) and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        ours = list_models()
        close = difflib.get_close_matches(name, ours, n=3) or difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"Unknown vision model {name!r}.{hint} list_models() shows all {len(ours)}.")
    base = name.partition(".")[0]
    if timm.is_model(base) and _ours(base):
        built = inspect.get_annotations(timm.model_entrypoint(base), eval_str=True).get("return")
        if isinstance(built, type):
            check_kinds(name, [kind for kind in built.__mro__ if kind.__module__.startswith(_PACKAGE)], options)
    with options_of(f"model {name!r}"):
        return timm.create_model(name, pretrained=pretrained, **options)


@contextlib.contextmanager
def options_of(what: str) -> Iterator[None]:
    """Inside, a constructor that does not know an option says whose option it should have been.

    Raises:
        TypeError: for such an option.
    """
    try:
        yield
    except TypeError as error:
        option = re.search(r"unexpected keyword argument '(.+?)'(?:\. Did you mean .*)?$", str(error), re.DOTALL)
        if option is None:
            raise
        raise TypeError(f"{what} has no option {option[1]!r}.") from error
