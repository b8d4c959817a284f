"""`omnissm vision VERB`: the verbs that need no trainer, as plain typed functions; also `python -m`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def predict(
    checkpoint: Path,
    images: list[Path],
    out: str = "predictions.csv",
    sheet: str | None = "contact_sheet.png",
    top: int = 5,
    batch_size: int = 32,
    device: str = "cpu",
    on_bad: Literal["raise", "skip"] = "raise",
    drawings: str | None = None,
    threshold: float = 0.3,
    window: bool = False,
) -> None:
    """Classes of new images, or the boxes or masks in them, as a table and a sheet of pictures.

    A classifier's sheet has the least certain images first; those of a detector and a segmenter are drawn on.

    Args:
        checkpoint: Model folder, run folder or .ckpt file.
        images: Image files and folders of them.
        out: Table: .csv.
        sheet: Picture of the images with their classes: .png or .jpg; null for none.
        top: Classes named for each image.
        batch_size: Images at a time of a classifier.
        device: Where to compute: cpu or cuda.
        on_bad: "raise" at a file that cannot be read, or "skip" it and say so in the table.
        drawings: Folder for a drawing of each image and, of a segmenter, the mask; left out, none.
        threshold: Least score of a detector's boxes.
        window: Let a segmenter look at large images through overlapping windows instead of resizing them.

    Raises:
        ValueError: if an image or the model cannot be read; the line says why.

    Example:
      omnissm vision predict --checkpoint runs/NAME --images '[photos, cat.jpg]' --out classes.csv
    """
    from .classifier import load, stored_model, write_sheet, write_table
    from .data.reading import find_images

    _check_out(out, (".csv",))
    if sheet is not None:
        _check_out(sheet, (".png", ".jpg", ".jpeg"))
    paths = find_images(images)
    stored = stored_model(checkpoint)
    if "kind" in stored.config.get("task", {}):
        from .dense.verbs import predict_dense

        places = [Path(place) if place is not None else None for place in (sheet, drawings)]
        predict_dense(stored, paths, Path(out), places[0], places[1], threshold, window, device, on_bad)
        return
    for option, given in (("drawings", drawings), ("window", window)):
        if given:
            raise ValueError(f"a classifier has no {option}, only segmenters and detectors; leave out --{option}.")
    model = load(checkpoint, device)
    found = list(model.predict(paths, top=top, batch_size=batch_size, on_bad=on_bad))
    write_table(found, Path(out))
    if sheet is not None:
        write_sheet(found, Path(sheet))
    bad = [p for p in found if p.error]
    for p in bad:
        sys.stderr.write(f"{p.error}\n")
    left = f", {len(bad)} could not be read" if bad else ""
    sys.stdout.write(f"{out}: {len(found) - len(bad)} images{left}\n" + (f"{sheet}\n" if sheet else ""))


def shard(data: Path, out: Path, part: Literal["train", "val", "test"] = "train", per_shard: int = 1000) -> None:
    """Pack a folder of images with one subfolder per class into tar files in the layout of WebDataset.

    Args:
        data: The folder; its subfolders are the classes.
        out: Folder for PART-00000.tar, ... and classes.json.
        part: Which part they are.
        per_shard: Images per file.

    Raises:
        ValueError: if a class folder is empty, or its classes differ from those of parts written before.

    Example:
      omnissm vision shard --data photos/train --out shards
    """
    import json

    from .data.reading import read_class_folder
    from .data.shards import CLASSES, write_shards

    listed = out / CLASSES
    known = json.loads(listed.read_text()) if listed.is_file() else None
    paths, labels, classes = read_class_folder(data, known)
    written = write_shards(paths, labels, classes, out, part, per_shard)
    sys.stdout.write(f"{out}: {len(paths)} images of {len(classes)} classes in {len(written)} files\n")


def plot(
    checkpoint: Path | None = None,
    model: str | None = None,
    kind: Literal["receptive_field", "influence", "mixing_matrix"] = "receptive_field",
    images: list[Path] | None = None,
    block: int = 0,
    out: str = "plot.png",
) -> None:
    """Draw the effective receptive field of a model, the reach of one block, or its mixing matrix.

    Args:
        checkpoint: Model folder, run folder or .ckpt file.
        model: Instead, the name of an untrained model.
        kind: "receptive_field" (gradient of the middle cell's last features, per pixel), "influence" (what moves the
            middle cell in one block, per cell) or "mixing_matrix" (of a block of hydra_vit).
        images: Files and folders to average over, at most 32 images; left out, noise.
        block: Number of the block, for the other kinds.
        out: Picture: .png, .pdf or .svg.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the model has not what the picture needs.

    Example:
      omnissm vision plot --checkpoint runs/NAME --kind receptive_field --out field.png
    """
    import torch

    from . import plots
    from .classifier import load
    from .data.reading import find_images, read_image
    from .data.transforms import eval_transform
    from .registry import create_model
    from .tasks import normalized

    _check_out(out, (".png", ".pdf", ".svg"))
    if (checkpoint is None) == (model is None):
        raise ValueError("give either --checkpoint or --model, to say which model is meant.")
    if checkpoint is not None:
        loaded = load(checkpoint)
        net, name, size, crop = loaded.net, loaded.name, loaded.image_size, loaded.crop_pct
    else:
        name, crop = str(model), 1.0
        net = create_model(name)
        size = int(net.default_cfg["input_size"][-1])  # type: ignore[index, union-attr, arg-type]
    if images:
        transform = eval_transform(size, crop)
        pictures = torch.stack([transform(read_image(path)) for path in find_images(images)[:32]])
        batch = normalized(pictures, net)
    else:
        batch = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    axes: tuple[str, ...]
    if kind == "receptive_field":
        values, axes = plots.receptive_field(net, batch), ("row, pixels", "column, pixels")
    elif kind == "influence":
        values, axes = plots.influence(net, batch, block), ("row of cells", "column of cells")
    else:
        values, axes = plots.mixing_matrix(net, batch, block), ("output patch", "input patch", "weight")
    place = "" if kind == "receptive_field" else f", block {block}"
    title = f"{name}: {kind.replace('_', ' ')}{place}"
    sys.stdout.write(f"{plots.save(plots.draw(values, title, *axes), out)}\n")


def benchmark(
    models: list[str],
    device: str = "cpu",
    batch_size: int = 8,
    image_size: int = 224,
    threads: int = 1,
    bf16: bool = False,
    compile: bool = False,
    training: bool = True,
    out: str | None = None,
) -> None:
    """Time models side by side: milliseconds per image of inference and of a training step, and peak memory.

    Args:
        models: Names, of this package or of timm.
        device: cpu or cuda. On a CPU times are of the processor, on a GPU of the wall clock.
        batch_size: Images per call.
        image_size: Side of the images, pixels.
        threads: Threads of torch on the CPU.
        bf16: Autocast to bfloat16.
        compile: Use torch.compile.
        training: Time training steps too.
        out: Write the table here too: .json.

    Raises:
        ValueError: for an unknown model, or a number below 1.

    Example:
      omnissm vision benchmark --models '[hydra_vit_tiny_patch16_224, deit_tiny_patch16_224]'
    """
    import json

    import torch

    from ..ssmcore.training.checkpoints import write_atomic
    from .timing import time_model

    if out is not None:
        _check_out(out, (".json",))
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}.")
    torch.set_num_threads(threads)
    rows = []
    sys.stdout.write(f"{'model':34} {'parameters':>12} {'inference':>12} {'training':>12}   ms per image\n")
    for name in models:
        row = time_model(
            name,
            device=device,
            batch_size=batch_size,
            image_size=image_size,
            bf16=bf16,
            compile=compile,
            training=training,
        )
        rows.append(row)
        trained = f"{row['training_ms']:12.3f}" if training else f"{'-':>12}"
        sys.stdout.write(f"{name:34} {row['parameters']:12,} {row['inference_ms']:12.3f} {trained}\n")
    if out is not None:
        about = {"device": device, "threads": threads, "torch": torch.__version__}
        write_atomic(Path(out), json.dumps({**about, "rows": rows}, indent=2) + "\n")


def list_names(pattern: str = "*") -> None:
    """Names of the models with their parameters and default input.

    Args:
        pattern: Shell pattern, such as vmamba_*.

    Example:
      omnissm vision list --pattern 'hydra_vit_*'
    """
    from .registry import create_model, list_models

    found = list_models(pattern)
    if not found:
        raise ValueError(f"no model's name is like {pattern!r}; `omnissm vision list` shows all.")
    for name in found:
        net = create_model(name, device="meta")
        count = sum(p.numel() for p in net.parameters())
        size = "x".join(map(str, net.default_cfg["input_size"]))  # type: ignore[index, union-attr]
        sys.stdout.write(f"{name:34} {count:12,} {size}\n")


def _check_out(out: str, suffixes: Sequence[str]) -> None:
    """Refuse a bad name before the work, not after it."""
    if Path(out).suffix not in suffixes:
        raise ValueError(f"got the name {out!r}, expected one ending in {', '.join(suffixes)}.")


if __name__ == "__main__":
    from ..__main__ import main

    sys.exit(main(["vision", *sys.argv[1:]]))
