"""What data modules of masks and of boxes share: sizes, loaders, decoded images kept in memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

from ...ssmcore.training import EpochSampler, SSMData
from .joint import DenseAugment, View, train_view
from .reading import read_image

log = logging.getLogger(__name__)
MOST_BYTES = 4 * 10**9  # of decoded images that are kept without being asked for

OnBad = Literal["raise", "skip"]


class DenseData(SSMData):
    """Base of the data modules with masks or boxes.

    Args:
        classes: Names of the classes.
        image_size: Side, or rows and columns, of the images that the model sees, pixels; images are fitted into it
            with their proportions kept.
        batch_size: Training images per batch and process.
        eval_batch_size: Others.
        num_workers: Processes that transform images.
        in_memory: Keep decoded images and masks; None: of parts that take 4 GB at most.
        augment: "none", "flip", "cells" or "scenes", see `train_view`.
        augment_args: Changes of it.
        on_bad: "raise" at the first fault in the data, or "skip" what is faulty: counted, and named in the log; for
            this every image is read once at the start.
        seed: Decides splits and, with the run's seed, the order of training.

    Attributes:
        classes: Names of the classes.
        counts: What was left out or changed, by its kind.

    Raises:
        ValueError: if an option is out of range.
    """

    collate: Callable[..., Any]

    def __init__(
        self,
        classes: Sequence[str] = (),
        image_size: int | tuple[int, int] = 512,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        in_memory: bool | None = None,
        augment: DenseAugment = "flip",
        augment_args: dict[str, Any] | None = None,
        on_bad: OnBad = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(rows, columns, batch_size, eval_batch_size) < 1:
            sizes = f"image_size={image_size}, batch_size={batch_size}, eval_batch_size={eval_batch_size}"
            raise ValueError(f"sizes must be positive, got {sizes}.")
        if on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', got {on_bad!r}.")
        self.image_size = (int(rows), int(columns))
        self.classes = [str(name) for name in classes]
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.in_memory, self.on_bad, self.seed = in_memory, on_bad, seed
        self.train_view = train_view(self.image_size, augment, augment_args)
        self.eval_view = View(self.image_size)
        self.counts: dict[str, int] = {}
        self._parts: dict[str, Dataset] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        self.setup()
        return len(self.classes)

    def read_parts(self) -> dict[str, Dataset]:
        """The parts by name; subclasses override this."""
        raise TypeError(f"{type(self).__name__} reads no data; use MaskFolder or CocoBoxes.")

    def setup(self, stage: str | None = None) -> None:
        """Find and check all images."""
        if not self._parts:
            self._parts = self.read_parts()
            for kind, count in self.counts.items():
                log.warning("%s: %d", kind, count)

    def note(self, kind: str, place: str) -> None:
        """Count one thing that is left out or changed."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        log.info("%s: %s", kind, place)

    def fault(self, kind: str, place: str, advice: str) -> None:
        """Raise or count a fault, as `on_bad` says."""
        if self.on_bad == "raise":
            raise ValueError(f"{place}: {kind}. {advice}, or set on_bad='skip' to leave it out.")
        self.note(kind, place)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that there are."""
        self.setup()
        return tuple(self._parts)

    def part(self, name: str) -> Dataset:
        """One part.

        Raises:
            ValueError: if there is no such part.
        """
        self.setup()
        if name not in self._parts:
            raise ValueError(f"This data set has no part {name!r}, only {', '.join(self._parts)}.")
        return self._parts[name]

    def train_dataloader(self) -> DataLoader:
        """Training images in a seeded random order; a last batch that is not full is left out."""
        dataset = self.part("train")
        full = len(EpochSampler(dataset, shuffle=True)) >= self.batch_size  # of this process
        return self._loader(dataset, self.batch_size, shuffle=True, drop_last=full)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation images in order; nothing in a fit on data without that part."""
        self.setup()
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and "val" not in self._parts:
            return []
        return self._loader(self.part("val"), self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        """Test images in order; those of validation where there are no others, which the log says."""
        self.setup()
        if "test" not in self._parts:
            log.warning(
                "There is no test part: the validation images are tested, by which the best weights were chosen."
            )
        return self._loader(self.part("test" if "test" in self._parts else "val"), self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """The test images."""
        return self.test_dataloader()

    def eval_loader(self, name: str) -> DataLoader:
        """Any part in order and without augmentation."""
        dataset = copy.copy(self.part(name))
        dataset.view = None  # type: ignore[attr-defined]
        return self._loader(dataset, self.eval_batch_size)

    def _loader(self, dataset: Dataset, batch_size: int, **options: Any) -> DataLoader:
        collate = type(self).collate
        return self.create_loader(dataset, batch_size, num_workers=self.num_workers, collate_fn=collate, **options)

    def state(self) -> dict[str, Any]:
        """What a saved model must know of its data, as plain JSON values."""
        self.setup()
        return {"classes": self.classes, "image_size": list(self.image_size)}


class Pictures:
    """Reads image k of a list of files as bytes (3, height, width), and keeps it if asked.

    Args:
        paths: The files.
        in_memory: Read all now and keep them; None: if they take 4 GB at most.

    Attributes:
        kept: The images in memory; None where they are read anew each time.
    """

    def __init__(self, paths: Sequence[Path], in_memory: bool | None) -> None:
        self.paths = list(paths)
        keep = decoded_bytes(paths, MOST_BYTES) <= MOST_BYTES if in_memory is None else in_memory
        self.kept: list[Tensor] | None = [picture(path) for path in paths] if keep else None

    def __call__(self, k: int) -> tv_tensors.Image:
        return tv_tensors.Image(self.kept[k] if self.kept is not None else picture(self.paths[k]))


def decoded_bytes(paths: Sequence[Path], most: int) -> int:
    """Bytes of images once they are decoded, from the heads of the files; counted no further than beyond `most`."""
    total = 0
    for path in paths:
        with Image.open(path) as image:
            total += 3 * image.width * image.height
        if total > most:
            break
    return total


def picture(path: Path) -> Tensor:
    """An image file as bytes, (3, height, width).

    Raises:
        BadImageError: if it cannot be read.
    """
    return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1).contiguous()
