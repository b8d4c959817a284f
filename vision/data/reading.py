"""Image files as RGB pictures, whatever they hold, and folders of them with a class per subfolder."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
# What Pillow raises at files that are no images, damaged, cut off, or too large for the memory.
UNREADABLE = (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError)


class BadImageError(ValueError):
    """An image file that cannot be read."""


def read_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Read an image as RGB.

    Grey, palette and CMYK images are converted; transparent pixels become white; 16-bit grey values lose their lower
    eight bits; of an animation the first frame is read.

    Args:
        source: Path, or the file's content.
        name: Name for the error message, where `source` is content.

    Raises:
        BadImageError: if it is no image, damaged or cut off.
        FileNotFoundError: if there is no such file.
    """
    label = name or (str(source) if not isinstance(source, bytes) else "image")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return _as_rgb(image)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        reason = "not an image file" if isinstance(error, UnidentifiedImageError) else str(error) or "memory is full"
        raise BadImageError(f"{label!r} cannot be read: {reason}. Use on_bad='skip' to leave it out.") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I;16") or (image.mode == "I" and values.max(initial=0) > 255):
            values = values / 257  # 65535 becomes 255
        elif image.mode == "F" and values.max(initial=0) <= 1:
            values = values * 255
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def find_images(places: Iterable[str | Path]) -> list[Path]:
    """Image files: those named, and all below the folders named, sorted.

    Raises:
        FileNotFoundError: if a place does not exist.
        ValueError: if there is no image at all.
    """
    found: list[Path] = []
    names = [Path(place) for place in places]
    for place in names:
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
        elif place.is_file():
            found.append(place)
        else:
            raise FileNotFoundError(2, "No such file or folder", str(place))
    if not found:
        raise ValueError(f"no image in {', '.join(map(str, names))}; known are {', '.join(SUFFIXES)}.")
    return found


def read_class_folder(
    root: Path, classes: list[str] | None = None, *, allow_empty: bool = False
) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and classes of a folder with one subfolder per class, in the order of their names.

    Args:
        root: The folder.
        classes: Classes to expect, of the training part; others are refused.
        allow_empty: Take classes without images.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it has no subfolders, an empty one, or one of an unknown class.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{str(root)!r} does not exist; expected images as {root}/CLASS/NAME.jpg with one folder per class."
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"{str(root)!r} has no subfolders; expected one per class.")
    names = classes or [folder.name for folder in folders]
    paths: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        if folder.name not in names:
            raise ValueError(f"{str(folder)!r} is no class of the training part, which has {', '.join(names)}.")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files and not allow_empty:
            raise ValueError(f"class folder {str(folder)!r} holds no image; remove it or set allow_empty=True.")
        paths += files
        labels += [names.index(folder.name)] * len(files)
    return paths, labels, names
