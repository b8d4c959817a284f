"""One line out of an error of the parser, with close names for a misspelt key, or of a loader's process."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_KEY = re.compile(
    r"(?:nrecognized arguments:|not accept option|not accept nested key|^Option|: Option) ['\"]?(-{0,2}[\w.+-]+)"
)
_SHORT = re.compile(r"expected one of ([\w.]+)\.(\w+)(?:, null)?; got (\w+)$")
_CLASS = re.compile(r"given class_path '([\w.]+)\.(\w+)': module '[\w.]+' has no attribute")


def explain(message: str, parser: Any) -> str:
    """The message on one line, with the close name of an unknown option and the way out of known confusions.

    Args:
        message: What the parser says; may have many lines.
        parser: The parser, whose options are candidates, besides those of classes named in the message.
    """
    text = shorten(" ".join(str(message).split()))
    hints = []
    if unknown := _CLASS.search(text):
        classes = [name for name, value in vars(import_module(unknown[1])).items() if inspect.isclass(value)]
        hints += _close(unknown[2], classes)
    if wrong := _SHORT.search(text):
        base = getattr(import_module(wrong[1]), wrong[2])
        hints += _close(wrong[3], [kind.__name__ for kind in _subclasses(base)])
    found = _KEY.search(text)
    if found and "Did you mean" not in text:
        names = set(_names(parser, text))
        word = next((part for part in found[1].lstrip("-").split(".") if part not in names), "")
        hints += _close(word, sorted(names)) or ["--help lists all options."]
    missing = re.search(r"the following arguments are required: ((?:\w+\.(?:data|model)(?:, )?)+)", text)
    if missing:
        text = text.replace(missing[0], f"the configuration lacks {re.sub(r'[a-z]+[.]', '', missing[1])}")
        hints.append("Name a configuration with -c, or the folder of an earlier run with --run.")
    # Where the package `lightning` is there too, its classes are found but are none of pytorch_lightning's.
    foreign = "does not correspond to a subclass" in text and find_spec("lightning") is not None
    if "lightning.pytorch" in text or foreign:
        hints.append("Write pytorch_lightning instead of lightning.pytorch, or the class's name alone.")
    # An error inside a class has come by here before, and begins with the option's name already.
    text = re.sub(r'^Parser key "([\w.]+)": (?=[\w.]+: expected )', r"\1.", text)
    text = re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", text)
    text = re.sub(r"Expected an? <class '(\w+)'>\. Got value: ", r"expected \1; got ", text)
    return " ".join([text if not hints or text.endswith((".", "?")) else f"{text}.", *hints])


def _close(word: str, names: Sequence[str]) -> list[str]:
    close = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    return [f"Did you mean {' or '.join(repr(name) for name in close)}?"] if close else []


def _subclasses(base: type) -> Iterator[type]:
    kind: type
    for kind in base.__subclasses__():
        yield kind
        yield from _subclasses(kind)


def shorten(text: str) -> str:
    """Drop what a parser adds about alternatives that were not meant: None beside a class, and the whole value."""
    text = re.sub(r"- Expected a path but \S+ either not accessible or invalid - ", "", text)
    union = r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: - "
    while found := re.search(union, text):
        before, errors = text[: found.start()], text[found.end() :]
        errors, _, value = errors.partition(" Given value type: ")
        first = errors.split(" - Expected a ")[0]
        if first.startswith("Expected a "):
            given = value.rpartition("Given value: ")[2]
            first = f"expected one of {_kinds(found[1])}; got {given}"
        elif restricted := re.match(r"Not of type (\w+): ", first):
            first = f"expected {_number(restricted[1])}; got {value.rpartition('Given value: ')[2]}"
        text = before + first
    text = re.sub(r" - Not a valid subclass of .*", "", text)
    if restricted := re.search(r"Not of type (\w+): (\S+) does not .*", text):
        text = f"{text[: restricted.start()]}expected {_number(restricted[1])}; got {restricted[2]}"
    whole = r'^(Parser key "(\w+)"): Unable to load config .*'
    text = re.sub(whole, r"\1: expected options, such as --\2.NAME VALUE", text)
    text = re.sub(r"Expected a dot import path string: (\S+)", r"expected the name of a class; got \1", text)
    while (joined := re.sub(r'^(Parser key "[\w.]+)": Parser key "', r"\1.", text)) != text:
        text = joined
    return re.sub(r"(?<=is not accepted) (?=Did you mean)", ". ", text.partition(" Given value type: ")[0])


def _number(kind: str) -> str:
    """A restricted kind of number in words."""
    known = {"PositiveInt": "a whole number above 0", "NonNegativeFloat": "a number of at least 0"}
    return known.get(kind, kind)


def _kinds(union: str) -> str:
    """Types of a union as a user writes them: choices one by one, classes by name, null for None."""
    kinds: list[str] = []
    for choices, name in re.findall(r"Literal\[(.*?)\]|<class '(?:builtins\.)?([\w.]+)'>", union):
        kinds += choices.replace("'", "").split(", ") if choices else [name.replace("NoneType", "null")]
    if "Callable" in union:
        kinds.insert(0, "the name of a class")
    return ", ".join(dict.fromkeys(kinds)) or union


def _names(parser: Any, text: str) -> Iterator[str]:
    for action in parser._actions:
        yield from str(action.dest).split(".")
        for inner in (getattr(action, "_name_parser_map", None) or {}).values():
            yield from _names(inner, "")
    for path in set(re.findall(r"[A-Za-z_]\w*(?:\.\w+)+", text)):
        module, _, name = path.rpartition(".")
        try:
            target = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            continue
        if inspect.isclass(target):
            yield from inspect.signature(target).parameters


def unknown_metric(error: Exception) -> str:
    """What to say where a callback watches a metric that is not logged; empty for other errors."""
    stopping = r"conditioned on metric `(.+?)` which is not available.*? any of the following: (.*)"
    keeping = r"ModelCheckpoint\(monitor='(.+?)'\)`? could not find .*? returned metrics: \[(.*?)\]"
    found = re.search(stopping, str(error)) or re.search(keeping, str(error))
    if found is None:
        return ""
    names = [name for name in re.findall(r"[\w/-]+", found[2]) if "/" in name and not name.startswith("lr-")]
    hint = _close(found[1], names) or [f"There are {', '.join(names)}."]
    return f"No metric {found[1]!r} is logged. {hint[0]}"


def dead_worker(error: Exception) -> str:
    """What to say where a loader's process has been killed; empty for other errors."""
    found = re.search(r"DataLoader worker \(pid.*", str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return ""
    advice = "Often memory has run out: try fewer workers or a smaller batch."
    return f"A process that loads data has ended: {found[0]} {advice}"
