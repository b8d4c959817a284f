"""Trained classifiers out of folders and checkpoints, and what they say about new images."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

from ..ssmcore.training.checkpoints import (
    CONFIG,
    ModelFolder,
    export_checkpoint,
    load_weights,
    read_model_folder,
    write_atomic,
)
from ..ssmcore.training.devices import find_device
from ..ssmcore.training.export import best_checkpoint
from .data.reading import BadImageError, read_image
from .data.transforms import eval_transform
from .registry import create_model
from .tasks import normalized


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image.

    Attributes:
        path: The file.
        classes: The best classes, best first; empty if the file cannot be read.
        probabilities: Their probabilities.
        error: Why the file cannot be read, else "".
    """

    path: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    error: str = ""


@dataclass(frozen=True)
class Classifier:
    """A trained network with what it must know of its images.

    Attributes:
        name: The model's name.
        net: The network, in evaluation mode.
        classes: Names of the classes.
        image_size: Side of the images it sees, pixels.
        crop_pct: Share of an image that the crop keeps.
    """

    name: str
    net: nn.Module
    classes: tuple[str, ...]
    image_size: int
    crop_pct: float

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Of images (batch, 3, height, width) in [0, 1]: (batch, classes) on the CPU."""
        place = next(self.net.parameters())
        return self.net(normalized(images.to(place.device, place.dtype), self.net)).float().softmax(-1).cpu()

    def predict(
        self, paths: Sequence[Path], *, top: int = 5, batch_size: int = 32, on_bad: str = "raise"
    ) -> Iterator[Prediction]:
        """Classes of image files, in their order.

        Args:
            paths: The files.
            top: Classes to name for each.
            batch_size: Images at a time.
            on_bad: "raise" at a file that cannot be read, or "skip" it with its reason in `error`.

        Raises:
            BadImageError: for a file that cannot be read, with on_bad="raise".
            ValueError: if `top` or `batch_size` is below 1.
        """
        for what, number in (("top", top), ("batch_size", batch_size)):
            if number < 1:
                raise ValueError(f"{what} must be at least 1, got {number}.")
        transform = eval_transform(self.image_size, self.crop_pct)
        for start in range(0, len(paths), batch_size):
            tensors, errors = [], {}
            for path in paths[start : start + batch_size]:
                try:
                    tensors.append(transform(read_image(path)))
                except BadImageError as error:
                    if on_bad == "raise":
                        raise
                    errors[path] = str(error)
            found: Iterator[Tensor] = iter(self.probabilities(torch.stack(tensors)) if tensors else ())
            for path in paths[start : start + batch_size]:
                if path in errors:
                    yield Prediction(path, (), (), errors[path])
                    continue
                values, best = next(found).topk(min(top, len(self.classes)))
                yield Prediction(path, tuple(self.classes[k] for k in best.tolist()), tuple(values.tolist()))


def load(checkpoint: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """Read a model folder, a run's folder or a .ckpt file.

    Args:
        checkpoint: Where it is; of a run's folder `model/` is read unless its best checkpoint is newer.
        device: Where the network goes.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no image classifier, or the device is not there.
    """
    place = find_device(device)
    return _built(stored_model(checkpoint), str(checkpoint), place)


def stored_model(checkpoint: str | Path) -> ModelFolder:
    """Contents of a model folder, of a run's folder or of a .ckpt file, as `load` finds them.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"no model at {str(path)!r}; give a model folder, a run's folder or a .ckpt file.")
    if (path / CONFIG).is_file():
        return read_model_folder(path)
    config = path / "model" / CONFIG
    try:
        newest = best_checkpoint(path)
    except FileNotFoundError:
        if config.is_file():
            return read_model_folder(config.parent)
        raise
    if config.is_file() and config.stat().st_mtime_ns >= newest.stat().st_mtime_ns:
        return read_model_folder(config.parent)
    with tempfile.TemporaryDirectory() as scratch:
        return read_model_folder(export_checkpoint(newest, Path(scratch) / "model"))


def _built(stored: ModelFolder, source: str, device: torch.device) -> Classifier:
    domain, _, name = str(stored.config.get("model", "")).partition("/")
    if domain != "vision" or "data.json" not in stored.files or "kind" in stored.config.get("task", {}):
        raise ValueError(f"{source!r} holds {stored.config.get('model')!r}, expected an image classifier.")
    data: dict[str, Any] = json.loads(stored.files["data.json"])
    net = create_model(name, **stored.config.get("args", {}))
    load_weights(net, stored.state, source=source)
    return Classifier(name, net.to(device).eval(), tuple(data["classes"]), data["image_size"], data["crop_pct"])


def write_table(predictions: Sequence[Prediction], out: Path) -> None:
    """Write a CSV file: path, class, probability, the further classes and their probabilities, and the error."""
    width = max((len(p.classes) for p in predictions), default=0)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["path", *(f"{part}{k + 1}" for k in range(width) for part in ("class", "probability")), "error"])
    for p in predictions:
        cells = [cell for name, value in zip(p.classes, p.probabilities) for cell in (name, f"{value:.6f}")]
        writer.writerow([str(p.path), *cells, *[""] * (2 * (width - len(p.classes))), p.error])
    write_atomic(out, buffer.getvalue())


def write_sheet(predictions: Sequence[Prediction], out: Path, limit: int = 60, columns: int = 6) -> None:
    """Write a contact sheet: images with their class and probability below, the least certain first.

    Args:
        predictions: What to show; files that could not be read are shown as empty fields.
        out: Picture, .png or .jpg.
        limit: Images at most.
        columns: Images per row.
    """
    shown = sorted(predictions, key=lambda p: p.probabilities[:1])[:limit]
    side, line, gap = 128, 34, 10
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for k, p in enumerate(shown):
        left, top = gap + k % columns * (side + gap), gap + k // columns * (side + line + gap)
        if p.error:
            draw.rectangle((left, top, left + side - 1, top + side - 1), outline="#c8553d")
            draw.text((left + 4, top + 4), "cannot be read", fill="#c8553d")
        else:
            picture = ImageOps.contain(read_image(p.path), (side, side))  # also enlarges small ones
            sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
            draw.text((left, top + side + 2), f"{p.classes[0][:13]}: {p.probabilities[0]:.0%}", fill="#1f2933")
        draw.text((left, top + side + 17), p.path.name[-20:], fill="#7b8794")
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG" if out.suffix.lower() in (".jpg", ".jpeg") else "PNG")
    write_atomic(out, buffer.getvalue())
