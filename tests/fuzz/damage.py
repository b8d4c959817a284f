"""Damage to files: bytes, lines, fields, entries of JSON and YAML, and arrays that become others."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

HUGE = "9" * 30
TOKENS = [
    b"", b"\0", b"\r\n", b"\n", b"\t", b",", b":", b'"', b"'", b"-", b"-1", b"0", HUGE.encode(), b"-" + HUGE.encode(),
    b"1e999", b"nan", b"inf", b"NA", b"null", b"1.5", b"\xef\xbb\xbf", b"\xff\xfe",
    "\u00b2\u0663é\U0001f9ec".encode(),
    b"\xed\xa0\x80", b">", b"#", b"@", b"{", b"[" * 5000, b"{" * 300, b"=", b"..", b"../../x", b"/",
    b"A" * 70_000, b"%00",
    b"2024-02-30", b"1677-01-01", b"9999-12-31", b"true", b"*", b"<DEL>", b"!!python/object/apply:os.getcwd []", b"1_0",
    b"\x1f\x8b",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 2**40, 10**30, float("nan"), float("inf"), "", "x", "é\0", [], [1, "a"], {}, {"a": 1},
    "../../x", [[]], -(2**63), 1e308,
]  # fmt: skip
OPERATIONS = (
    "flip", "cut", "drop", "double", "insert", "number", "line drop", "line double", "line swap", "field", "column",
    "case", "newlines", "value", "key", "array",
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """Changes, each of (operation, place, amount, choice) with places and amounts in [0, 1).

    Attributes:
        inside: Change what is packed rather than the packed file.
        which: Which of several contents.
        changes: What is done to it.
    """

    inside: bool
    which: float
    changes: tuple[tuple[str, float, float, int], ...]

    def change(self, payload: dict[str, bytes]) -> None:
        """Damage one of the contents."""
        name = sorted(payload)[int(self.which * len(payload))]
        for change in self.changes:
            payload[name] = damaged(payload[name], *change)

    def change_files(self, folder: Path) -> None:
        """Damage one of the files."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = files[int(self.which * len(files))]
        content = path.read_bytes()
        for change in self.changes:
            content = damaged(content, *change)
        path.write_bytes(content)


_share = st.floats(0, 1, exclude_max=True, width=32)
_place = st.one_of(_share, _share.map(lambda x: x**4))  # heads are where lengths and names stand
damages = st.builds(
    Damage,
    st.booleans(),
    _share,
    st.lists(st.tuples(st.sampled_from(OPERATIONS), _place, _share, st.integers(0, 999)), min_size=1, max_size=3).map(
        tuple
    ),
)


def damaged(content: bytes, operation: str, place: float, amount: float, choice: int) -> bytes:
    """The content after one change; an operation that does not fit it flips bits instead."""
    at, end = int(place * len(content)), 0
    end = min(len(content), at + 1 + int(amount**3 * len(content)))
    token = TOKENS[choice % len(TOKENS)]
    match operation:
        case "cut":
            return content[:at]
        case "drop":
            return content[:at] + content[end:]
        case "double":
            return content[:end] + content[at:]
        case "insert":
            return content[:at] + token + content[at:]
        case "number":  # over a length or a count in a binary head
            number = (2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 0, 2**64 - 1, 2**16)[choice % 7]
            size = (4, 8, 2)[choice % 3]
            return content[:at] + (number % 2 ** (8 * size)).to_bytes(size, "little") + content[at + size :]
        case "newlines":
            return content.replace(b"\n", (b"\r\n", b"\r", b"\n\n", b"")[choice % 4])
        case "case":
            return content.swapcase() if choice % 2 else content.upper()
        case "line drop" | "line double" | "line swap" | "field" | "column":
            return _lines(content, operation, place, amount, token)
        case "value" | "key":
            return _tree(content, operation, place, choice)
        case "array" if content.startswith(b"\x93NUMPY"):
            return _array(content, choice)
    flipped = bytearray(content)
    for k in range(1 + choice % 3):
        if flipped:
            flipped[(at + k * 7) % len(flipped)] ^= 1 + choice % 255
    return bytes(flipped)


def _lines(content: bytes, operation: str, place: float, amount: float, token: bytes) -> bytes:
    lines = content.split(b"\n")
    k, other = int(place * len(lines)), int(amount * len(lines))
    separator = max((b"\t", b",", b" ", b":"), key=lines[k].count)
    if operation == "line drop":
        del lines[k]
    elif operation == "line double":
        lines.insert(other, lines[k])
    elif operation == "line swap":
        lines[k], lines[other] = lines[other], lines[k]
    elif operation == "field":
        words = lines[k].split(separator)
        words[int(amount * len(words))] = token
        lines[k] = separator.join(words)
    else:  # a column goes, from all lines or from one on
        for row in range(k if place > 0.5 else 0, len(lines)):
            words = lines[row].split(separator)
            if len(words) > 1:
                del words[int(amount * len(words))]
            lines[row] = separator.join(words)
    return b"\n".join(lines)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    pairs = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, value in pairs:
        yield node, key
        yield from _places(value)


def _tree(content: bytes, operation: str, place: float, choice: int) -> bytes:
    """JSON or YAML with another value, or without a key, or with a key more."""
    is_json = content.lstrip()[:1] in (b"{", b"[")
    try:
        tree = json.loads(content) if is_json else yaml.safe_load(content)
        places = list(_places(tree))
    except (ValueError, yaml.YAMLError):
        places = []
    if not places:
        return damaged(content, "flip", place, 0.0, choice)
    node, key = places[int(place * len(places))]
    if operation == "value":
        node[key] = VALUES[choice % len(VALUES)]
    elif isinstance(node, dict) and choice % 2:
        node[f"{key}x"] = node.pop(key)
    else:
        del node[key]
    return (json.dumps(tree) if is_json else yaml.safe_dump(tree)).encode()


def _array(content: bytes, choice: int) -> bytes:
    """Another array of numbers in the place of one: type, shape or values."""
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        changed = (
            lambda: array.astype(np.float64) + 0.5,
            lambda: array.astype(np.float64) * np.nan,
            lambda: array.astype(str),
            lambda: array[None],
            lambda: array.reshape(-1)[:0],
            lambda: array.reshape(-1)[0],
            lambda: -1 - array,
            lambda: array[:-1],
            lambda: array.astype(np.uint64) + np.uint64(2**63),
            lambda: array.astype(np.int64) + 2**40,
            lambda: array.astype(np.complex64),
            lambda: array.astype("datetime64[s]"),
            lambda: array.reshape(-1)[::-1],
            lambda: np.full(array.shape, 255, np.uint8),
            lambda: array.astype(np.int8),
        )[choice % 15]()
    except Exception:  # not an array, or one that cannot be changed so
        return damaged(content, "flip", 0.0, 0.0, choice)
    buffer = io.BytesIO()
    np.save(buffer, changed, allow_pickle=False)
    return buffer.getvalue()
