"""One line out of a parser's error: what was wrong, with close names for a misspelt key."""

from __future__ import annotations

import difflib
import inspect
import re
from importlib import import_module
from typing import Any


def explain(message: str, parser: Any) -> str:
    """The message on one line, with the close name of an unknown option and the way out of known confusions.

    Args:
        message: What the parser says; may have many lines.
        parser: The parser, whose options are candidates, besides those of classes named in the message.
    """
    text = " ".join(str(message).split())
    hints = []
    found = re.search(r"(?:[Uu]nrecognized arguments:|nested key|[Kk]ey|[Oo]ption) ['\"]?(-{0,2}[\w.+-]+)", text)
    if found:
        word = found[1].lstrip("-").rpartition(".")[2]
        close = difflib.get_close_matches(word, sorted(_names(parser, text)), n=2, cutoff=0.6)
        if close:
            hints.append(f"Did you mean {' or '.join(repr(name) for name in close)}?")
    if "lightning.pytorch" in text:
        hints.append("Write pytorch_lightning instead of lightning.pytorch, or the class's name alone.")
    return " ".join([text, *hints])


def _names(parser: Any, text: str) -> set[str]:
    names = {part for action in parser._actions for part in str(action.dest).split(".")}
    for path in set(re.findall(r"[A-Za-z_]\w*(?:\.\w+)+", text)):
        module, _, name = path.rpartition(".")
        try:
            target = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            continue
        if inspect.isclass(target):
            for base in target.__mro__:
                names.update(inspect.signature(base.__init__).parameters)
    return names - {"self", "args", "kwargs"}
