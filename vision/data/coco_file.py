"""Annotation files in COCO's JSON layout, read with the standard library and checked.

Categories of any numbers become classes 0, 1, ... in the order of their numbers. Boxes, (x, y, width, height) in files,
become corners (x0, y0, x1, y1), cut at the image's borders.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MISSING_IMAGE = "image file missing"
UNKNOWN_CATEGORY = "annotation of an unknown category"
UNKNOWN_IMAGE = "annotation of an unknown image"
LEAST = 1e-3  # pixels a side of a box
DEGENERATE = "box without area inside the image left out"
CUT = "box cut at the border"
CROWD = "crowd region: not trained on, not counted in evaluation"
EMPTY = "image without boxes"

Fault = Callable[[str, str, str], None]
Note = Callable[[str, str], None]


@dataclass
class Record:
    """One image and its boxes.

    Attributes:
        path: The file.
        image_id: Its number in the annotation file.
        height: Rows.
        width: Columns.
        boxes: Corners (x0, y0, x1, y1), pixels.
        labels: Classes, 0, 1, ...
        crowd: Whether a box encloses many objects.
        area: Of the objects, pixels.
    """

    path: Path
    image_id: int
    height: int
    width: int
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    area: list[float] = field(default_factory=list)


@dataclass
class CocoFile:
    """What an annotation file says.

    Attributes:
        records: Images in the order of the file.
        categories: Number of each class in the file.
        classes: Names of the classes.
    """

    records: list[Record]
    categories: list[int]
    classes: list[str]


def read_coco(path: Path, images: Path, fault: Fault, note: Note, expected: CocoFile | None = None) -> CocoFile:
    """Read an annotation file.

    Args:
        path: The JSON file.
        images: Folder of the images.
        fault: Called as (kind, place, advice) for missing images and unknown categories or images; may raise.
        note: Called as (kind, place) for what has a defined answer: degenerate and cut boxes, crowds, empty images.
        expected: Of the training part, whose categories hold.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not in this layout.
    """
    content = _content(path)
    categories, classes = _categories(path, content)
    if expected is not None and dict(zip(categories, classes)) != dict(zip(expected.categories, expected.classes)):
        raise ValueError(f"{path} has the categories {', '.join(classes)}, training {', '.join(expected.classes)}.")
    number = {category: k for k, category in enumerate(categories)}
    records: dict[int, Record] = {}
    skipped: set[int] = set()
    for entry in content["images"]:
        values = _take(path, "an image", entry, ("id", "file_name", "height", "width"))
        key, file = _identity(path, "an image", entry, "id"), images / str(values["file_name"])
        if key in records or key in skipped:
            raise ValueError(f"{path} has two images with the id {key}.")
        if not os.path.isfile(file):  # False too for a name that no file can have
            fault(MISSING_IMAGE, str(file), "Put it there")
            skipped.add(key)
            continue
        height, width = (_whole(path, "an image", entry, name) for name in ("height", "width"))
        records[key] = Record(file, key, height, width)
    for entry in content["annotations"]:
        values = _take(path, "an annotation", entry, ("image_id", "category_id", "bbox"))
        place = f"{path}: annotation {entry.get('id', '?')}"
        image = _identity(path, "an annotation", entry, "image_id")
        category = _identity(path, "an annotation", entry, "category_id")
        if image in skipped:
            continue
        if image not in records:
            fault(UNKNOWN_IMAGE, f"{place} (image {image})", "Remove it")
        elif category not in number:
            fault(UNKNOWN_CATEGORY, f"{place} (category {category})", "List it under categories")
        else:
            _add(records[image], entry, number[category], place, note)
    for record in records.values():
        if not record.boxes:
            note(EMPTY, str(record.path))
    return CocoFile(list(records.values()), categories, classes)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object with images and annotations.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(f"{path} has no list {key!r}; COCO files have images, annotations and categories.")
    return content


def _categories(path: Path, content: Mapping[str, Any]) -> tuple[list[int], list[str]]:
    found = [_take(path, "a category", entry, ("id", "name")) for entry in content["categories"]]
    for entry in found:
        _whole(path, "a category", entry, "id", least=None)
    found.sort(key=lambda entry: entry["id"])
    numbers, names = [int(entry["id"]) for entry in found], [str(entry["name"]) for entry in found]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"{path} needs categories with different ids, got {numbers}.")
    if len(set(names)) < len(names):
        raise ValueError(f"{path} needs categories with different names, got {', '.join(names)}.")
    return numbers, names


def _take(path: Path, kind: str, entry: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise ValueError(f"{path}: {kind} has no {missing[0]!r}: {str(entry)[:80]}")
    return {key: entry[key] for key in keys}


def _whole(path: Path, kind: str, entry: Mapping[str, Any], key: str, least: int | None = 1) -> int:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError(f"{path}: {kind} needs a whole number as {key!r}: {str(entry)[:80]}")
    if least is not None and value < least:
        raise ValueError(f"{path}: {kind} needs {key!r} of at least {least}: {str(entry)[:80]}")
    return int(value)


def _identity(path: Path, kind: str, entry: Mapping[str, Any], key: str) -> Any:
    value = entry[key]
    if not isinstance(value, int | float | str):
        raise ValueError(f"{path}: {kind} needs a number or a text as {key!r}: {str(entry)[:80]}")
    return value


def _add(record: Record, entry: Mapping[str, Any], label: int, place: str, note: Note) -> None:
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        raise ValueError(f"{place}: bbox must be [x, y, width, height], got {box}.")
    x, y, width, height = (float(v) for v in box)
    x0, y0 = max(0.0, x), max(0.0, y)
    x1, y1 = min(float(record.width), x + width), min(float(record.height), y + height)
    if not all(math.isfinite(v) for v in box) or min(x1 - x0, y1 - y0) < LEAST:
        note(DEGENERATE, place)
        return
    if max(x0 - x, y0 - y, x + width - x1, y + height - y1) > 1e-3:
        note(CUT, place)
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"{place}: iscrowd must be 0 or 1, got {crowd!r}.")
    if crowd:
        note(CROWD, place)
    area = entry.get("area")
    record.boxes.append((x0, y0, x1, y1))
    record.labels.append(label)
    record.crowd.append(bool(crowd))
    record.area.append(float(area) if isinstance(area, int | float) and area > 0 else (x1 - x0) * (y1 - y0))
