"""Images in tar files, in the layout of WebDataset: KEY.jpg beside KEY.cls with the label's number.

Files are indexed once by their headers and then read at random, so order and division among processes are those of any
other data set, and an epoch sees each image once.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ...ssmcore.training import write_atomic
from .base import ImageData, Part, split_off
from .reading import SUFFIXES, read_image

CLASSES = "classes.json"
MOST_CLASSES = 1_000_000  # that are numbered without a file of names


class _Place(NamedTuple):
    shard: Path
    offset: int
    size: int
    name: str


class _Reader:
    """Reads image k from its place in a tar file."""

    def __init__(self, places: list[_Place]) -> None:
        self.places = places

    def __call__(self, k: int) -> Image.Image:
        place = self.places[k]
        with place.shard.open("rb") as file:
            file.seek(place.offset)
            return read_image(file.read(place.size), f"{place.shard}:{place.name}")


class TarShards(ImageData):
    """Images as ROOT/train-*.tar, with optional val-*.tar and test-*.tar and the classes' names in classes.json.

    Args:
        root: The folder.
        val_share: Share of each class's training images for validation, where there are no shards for it.
        options: Further options of `ImageData`.
    """

    def __init__(self, root: str | Path, val_share: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.root, self.val_share = Path(root), val_share

    def read_parts(self) -> tuple[dict[str, Part], list[str]]:
        """Parts and classes, from the headers of the tar files."""
        parts = {}
        for name in ("train", "val", "test"):
            shards = sorted(self.root.glob(f"{name}-*.tar"))
            if shards:
                parts[name] = read_shards(shards)
        if "train" not in parts:
            raise FileNotFoundError(
                f"no {self.root}/train-*.tar; `omnissm vision shard` makes such files from a folder of images."
            )
        listed = self.root / CLASSES
        highest = max(max(part.labels) for part in parts.values())
        if not listed.is_file() and highest >= MOST_CLASSES:
            raise ValueError(f"a label is {highest}; so many classes need names in {listed}.")
        classes = _names(listed) if listed.is_file() else [str(k) for k in range(highest + 1)]
        if highest >= len(classes):
            raise ValueError(f"a label is {highest}, but {listed} names only {len(classes)} classes.")
        if "val" not in parts and self.val_share > 0:
            stay, off = split_off(parts["train"].labels, self.val_share, self.seed)
            parts |= {"train": parts["train"].take(stay), "val": parts["train"].take(off)}
        return parts, classes


def read_shards(shards: Sequence[Path]) -> Part:
    """Index tar files.

    Raises:
        ValueError: if a file is no tar file or cut off, or an image has no label; the message names it.
    """
    places: list[_Place] = []
    labels: list[int] = []
    for shard in shards:
        images: dict[str, _Place] = {}
        found: dict[str, int] = {}
        try:
            with tarfile.open(
                shard, "r:"
            ) as archive:  # images are read at their place, so not out of a compressed file
                for member in archive:
                    key, _, suffix = member.name.rpartition(".")
                    if not member.isfile():
                        continue
                    if f".{suffix.lower()}" in SUFFIXES:
                        images[key] = _Place(shard, member.offset_data, member.size, member.name)
                    elif suffix in ("cls", "json"):
                        content = archive.extractfile(member)
                        found[key] = _label(content.read() if content else b"", suffix, f"{shard}:{member.name}")
        except tarfile.TarError as error:
            raise ValueError(f"{str(shard)!r} is no whole, uncompressed tar file: {error}.") from error
        missing = [place.name for key, place in images.items() if key not in found]
        if missing:
            raise ValueError(
                f"{str(shard)!r} has no label for {missing[0]!r} and {len(missing) - 1} others; expected a file of the"
                " same name ending in .cls with the label's number, or in .json with the entry 'label'."
            )
        places += images.values()
        labels += [found[key] for key in images]
    if not places:
        raise ValueError(f"no image in {', '.join(map(str, shards))}.")
    return Part(_Reader(places), labels, [f"{place.shard}:{place.name}" for place in places])


def _names(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold a list of the classes' names, got {str(names)[:60]}.")
    return names


def _label(content: bytes, suffix: str, name: str) -> int:
    try:
        label = json.loads(content) if suffix == "cls" else json.loads(content)["label"]
        if not isinstance(label, int) or isinstance(label, bool):
            raise TypeError("a label is a whole number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{name!r} holds no label: expected a number, got {content[:40]!r}.") from error
    if label < 0:
        raise ValueError(f"{name!r} holds label {label}, expected at least 0.")
    return label


def write_shards(
    paths: Sequence[Path],
    labels: Sequence[int],
    classes: Sequence[str],
    out: Path,
    part: str = "train",
    per_shard: int = 1000,
) -> list[Path]:
    """Write images and labels as tar files, each whole or not at all, and the classes' names.

    Args:
        paths: Image files; their content is stored as it is.
        labels: Number of each one's class.
        classes: Names of the classes.
        out: Folder for PART-00000.tar, ... and classes.json.
        part: "train", "val" or "test".
        per_shard: Images per file.

    Returns:
        The files.

    Raises:
        ValueError: if `per_shard` is below 1.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1, got {per_shard}.")
    written = []
    for number, rows in enumerate(_chunks(len(paths), per_shard)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for k in rows:
                key = f"{k:08d}"
                _add(archive, f"{key}{paths[k].suffix.lower()}", paths[k].read_bytes())
                _add(archive, f"{key}.cls", str(labels[k]).encode())
        path = out / f"{part}-{number:05d}.tar"
        write_atomic(path, buffer.getvalue())
        written.append(path)
    write_atomic(out / CLASSES, json.dumps(list(classes)) + "\n")
    return written


def _chunks(count: int, size: int) -> Iterator[range]:
    return (range(start, min(count, start + size)) for start in range(0, count, size))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
