"""The verbs for pixels and boxes: `predict` (drawings), `evaluate` (tables by class), `export-graph`."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ssmcore.training.checkpoints import ModelFolder, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

SHEET = 24  # drawings on a sheet at most


def predict_dense(
    stored: ModelFolder,
    paths: Sequence[Path],
    out: Path,
    sheet: Path | None,
    drawings: Path | None,
    threshold: float,
    window: bool,
    device: str,
    on_bad: str,
) -> None:
    """What `predict` does for a segmenter or a detector: a table, drawings, masks and a sheet."""
    from .draw import draw_boxes, draw_mask, encode, encode_mask, write_sheet
    from .predictor import load

    if not 0 <= threshold <= 1:
        raise ValueError(f"a threshold of scores is in [0, 1], got {threshold}.")
    model = load(stored, device)
    if window and model.kind == "detection":
        raise ValueError("only segmenters look through windows; leave out --window for a detector.")
    names = _names(paths)
    rows: list[list[Any]] = []
    shown: list[tuple[str, Tensor]] = []
    bad = 0
    for p, name in zip(model.predict(paths, threshold=threshold, window=window, on_bad=on_bad), names):
        if p.image is None:
            bad += 1
            sys.stderr.write(f"{p.error}\n")
            rows.append([str(p.path), *[""] * (6 if model.kind == "detection" else 3), p.error])
            continue
        if p.found is not None:
            drawn = draw_boxes(p.image, p.found, model.classes)
            for box, score, label in zip(p.found.boxes.tolist(), p.found.scores.tolist(), p.found.labels.tolist()):
                values = [f"{value:.2f}" for value in box]
                rows.append([str(p.path), model.classes[label], f"{score:.4f}", *values, ""])
        elif p.mask is not None:
            drawn = draw_mask(p.image, p.mask, model.classes)
            for k, label in enumerate(model.classes):
                count = int((p.mask == k).sum())
                rows.append([str(p.path), label, count, f"{count / p.mask.numel():.6f}", ""])
            if drawings is not None:
                write_atomic(drawings / f"{name}.mask.png", encode_mask(p.mask, len(model.classes)))
        if drawings is not None:
            write_atomic(drawings / f"{name}.png", encode(drawn))
        if len(shown) < SHEET:
            shown.append((p.path.name, drawn))
    boxes = ["path", "class", "score", "x0", "y0", "x1", "y1", "error"]
    _write_csv(boxes if model.kind == "detection" else ["path", "class", "pixels", "share", "error"], rows, out)
    if sheet is not None:
        write_sheet(shown, model.classes, sheet, first=int(model.kind == "segmentation"))
    left = f", {bad} could not be read" if bad else ""
    sys.stdout.write(f"{out}: {len(paths) - bad} images{left}\n")
    for place in (drawings, sheet):
        if place is not None:
            sys.stdout.write(f"{place}\n")


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of the drawings: the files' own, with a number where two are alike."""
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem, 1
        while not taken.isdisjoint((name, f"{name}.mask")):
            number += 1
            name = f"{path.stem}_{number}"
        taken |= {name, f"{name}.mask"}
        names.append(name)
    return names


def evaluate(
    checkpoint: Path,
    data: Path,
    out: str = "per_class.csv",
    part: str = "val",
    images: str = "images",
    masks: str = "masks",
    batch_size: int = 8,
    device: str = "cpu",
) -> None:
    """Metrics of each class on images with known masks or boxes.

    Args:
        checkpoint: Model folder, run folder or .ckpt file of a segmenter or detector.
        data: For a segmenter the folder with images and masks; for a detector an annotation file in COCO's layout.
        out: Table: .csv.
        part: Of the folder of masks: train, val or test; "all" takes every image.
        images: Folder of images beside the annotation file, or in the folder of masks.
        masks: Folder of masks.
        batch_size: Images at a time.
        device: Where to compute: cpu or cuda.

    Raises:
        ImportError: if pycocotools is missing, for a detector.
        ValueError: if model and data do not fit.

    Example:
      omnissm vision evaluate --checkpoint runs/NAME --data cells/val.json --out per_class.csv
    """
    from ..data import CocoBoxes, MaskFolder
    from .predictor import load

    if Path(out).suffix != ".csv":
        raise ValueError(f"got the name {out!r}, expected one ending in .csv.")
    model = load(checkpoint, device)
    options: dict[str, Any] = {"image_size": model.image_size, "eval_batch_size": batch_size, "in_memory": False}
    if model.kind == "segmentation":
        folder = MaskFolder(data, model.classes, images, masks, **{**options, **model.split})
        parts = list(folder.parts) if part == "all" else [part]
        rows = _segmenter_rows(model, (batch for name in parts for batch in folder.eval_loader(name)))
    else:
        if not data.is_file():
            kind = "is a folder" if data.is_dir() else "does not exist"
            raise FileNotFoundError(f"{str(data)!r} {kind}; expected an annotation file of boxes, as FOLDER/val.json.")
        boxes = CocoBoxes(data.parent, images, data.name, data.name, "", **options)
        loader = boxes.eval_loader("val")
        if tuple(boxes.classes) != model.classes:
            given, known = ", ".join(boxes.classes), ", ".join(model.classes)
            raise ValueError(f"{data} has the categories {given}; the model knows {known}.")
        rows = _detector_rows(model, loader)
    names = list(rows[0])
    _write_csv(names, [[_cell(row[name]) for name in names] for row in rows], Path(out))
    for line in [names, *([_cell(row[name]) for name in names] for row in rows)]:
        sys.stdout.write(" ".join(f"{cell:>12}" for cell in line) + "\n")
    sys.stdout.write(f"{out}\n")


def _segmenter_rows(model: Any, loader: Iterable[Any]) -> list[dict[str, Any]]:
    import torch

    from ..data.dense_batches import IGNORE
    from ..tasks import normalized
    from .metrics import confusion, overlap_table
    from .segmenter import unfitted

    place = next(model.net.parameters()).device
    matrix = confusion(len(model.classes)).to(place)
    with torch.inference_mode():
        for batch in loader:
            maps = model.net(normalized(batch.image.to(place), model.net)).float()
            for logits, mask, (height, width) in zip(maps, batch.mask, batch.size.tolist()):
                truth = mask[:height, :width].to(place)
                if bool((truth != IGNORE).any()):
                    matrix.update(unfitted(logits, (height, width)).argmax(0)[None], truth[None])
    return _with_mean(overlap_table(matrix.compute(), model.classes))


def _detector_rows(model: Any, loader: Iterable[Any]) -> list[dict[str, Any]]:
    import torch

    from ..tasks import normalized
    from .detection import LEAST, compare
    from .metrics import average_precision, precision_table

    place = next(model.net.parameters()).device
    metric = average_precision()
    counts = torch.zeros(len(model.classes), dtype=torch.int64)
    with torch.inference_mode():
        for batch in loader:
            found = model.net.detect(normalized(batch.image.to(place), model.net), LEAST)
            cpu = [type(one)(*(value.cpu() for value in one)) for one in found]
            metric.update(*compare(cpu, batch))
            counted = batch.labels[(batch.labels >= 0) & ~batch.crowd]
            counts += torch.bincount(counted, minlength=len(counts))
    rows = precision_table(metric.compute(), model.classes)
    return _with_mean([{**row, "boxes": int(count)} for row, count in zip(rows, counts)])


def _with_mean(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows and their mean over the classes that occur; counts are added."""
    mean: dict[str, Any] = {"class": "mean"}
    for name in rows[0]:
        if name in ("pixels", "boxes"):
            mean[name] = sum(row[name] for row in rows)
        elif name != "class":
            values = [row[name] for row in rows if row[name] == row[name]]
            mean[name] = sum(values) / len(values) if values else float("nan")
    return [*rows, mean]


def _cell(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4f}"
    return str(int(value)) if isinstance(value, float) and value > 1 else str(value)


def _write_csv(names: Sequence[str], rows: Iterable[Sequence[Any]], out: Path) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    write_atomic(out, buffer.getvalue())


def export_graph(checkpoint: Path, out: Path, batch: int | None = None) -> None:
    """Write a segmenter or a detector as a graph that runs without this package.

    It takes images in [0, 1] of the model's size and gives logits of all pixels, or boxes and scores of all cells, of
    which the caller keeps those that are sure and do not overlap.

    Args:
        checkpoint: Model folder, run folder or .ckpt file.
        out: File: .pt2 (torch.export) or .onnx.
        batch: Images at a time, at least 1; left out, any number (.pt2) or 1 (.onnx).

    Raises:
        ImportError: if onnxscript is missing.
        ValueError: if the model has no such graph.

    Example:
      omnissm vision export-graph --checkpoint runs/NAME --out detector.pt2
    """
    from .export import write_graph
    from .predictor import load

    write_graph(load(checkpoint), out, batch)
    sys.stdout.write(f"{out}\n")
