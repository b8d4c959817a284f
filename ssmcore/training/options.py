"""Options of models that come from files and command lines, where a word may stand for a number."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

__all__ = ["check_kinds"]

_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "true or false"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
}


def check_kinds(model: str, makers: Iterable[Callable[..., Any]], given: Mapping[str, Any]) -> None:
    """Refuse what is no number where an option is one; options annotated otherwise are left to the model.

    Args:
        model: Its name, for the message.
        makers: Classes and functions that take the options.
        given: Options with their values.

    Raises:
        TypeError: for the first option of another kind.
    """
    parameters = [one for maker in makers for one in inspect.signature(maker).parameters.values() if one.name in given]
    for parameter in parameters:
        value, note = given[parameter.name], parameter.annotation
        text = note if isinstance(note, str) else note.__name__ if inspect.isclass(note) else str(note)
        words = [word.strip() for word in text.split("|")]
        kinds = [word for word in words if word != "None"]
        if not kinds or not set(kinds) <= set(_KINDS) or (value is None and len(kinds) < len(words)):
            continue
        number = not isinstance(value, bool) or "bool" in kinds
        if not number or not isinstance(value, tuple(_KINDS[kind][0] for kind in kinds)):
            wanted = " or ".join(_KINDS[kind][1] for kind in kinds)
            raise TypeError(f"option {parameter.name!r} of model {model!r} must be {wanted}, got {value!r}.")
