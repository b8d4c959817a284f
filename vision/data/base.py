"""What image data modules share: parts with transforms, loaders, unreadable files, Mixup."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset

from ...ssmcore.training import EpochSampler, SSMData
from .batches import ImageBatch, Sample, collate
from .reading import BadImageError
from .transforms import Augment, Transform, eval_transform, train_transform

log = logging.getLogger(__name__)

OnBad = Literal["raise", "skip"]
PartName = Literal["train", "val", "test"]


class Part(NamedTuple):
    """One part of a data set: how to read image k, and labels and names of all."""

    read: Callable[[int], Image.Image]
    labels: Sequence[int]
    names: Sequence[str]

    def take(self, rows: Sequence[int]) -> Part:
        """Some of its images."""
        chosen = list(rows)
        return Part(_Chosen(self.read, chosen), [self.labels[k] for k in chosen], [self.names[k] for k in chosen])


class _Chosen:
    """Reads image k of a choice; a class, so that worker processes can receive it."""

    def __init__(self, read: Callable[[int], Image.Image], rows: list[int]) -> None:
        self.read, self.rows = read, rows

    def __call__(self, k: int) -> Image.Image:
        return self.read(self.rows[k])


class Images(Dataset):
    """A part with a transform. Unreadable images raise, or come as None for the batch to leave out.

    Args:
        part: What to read.
        transform: From picture to tensor.
        on_bad: "raise" or "skip".
    """

    def __init__(self, part: Part, transform: Transform, on_bad: OnBad = "raise") -> None:
        self.part, self.transform, self.on_bad = part, transform, on_bad

    def __len__(self) -> int:
        return len(self.part.labels)

    def sample_name(self, index: int) -> str:
        """An image as messages name it."""
        return self.part.names[index]

    def __getitem__(self, index: int) -> Sample:
        """Image, label and number."""
        try:
            image = self.part.read(index)
        except BadImageError:
            if self.on_bad == "raise":
                raise
            return None, self.part.labels[index], index
        return self.transform(image), self.part.labels[index], index


class ImageData(SSMData):
    """Base of the image data modules; subclasses read the parts.

    Args:
        image_size: Side of the images that the model sees, pixels.
        batch_size: Training images per batch and process.
        eval_batch_size: Others.
        num_workers: Processes that read images.
        augment: "none", "light" or "imagenet", see `train_transform`.
        augment_args: Its options.
        crop_pct: Share of the image that the evaluation crop keeps.
        mixup: Mixup's alpha; 0 for none. Labels are then soft.
        cutmix: CutMix's alpha; 0 for none.
        label_smoothing: Of the soft labels. Without Mixup and CutMix smoothing belongs to the task.
        on_bad: "raise" at an image that cannot be read, or "skip" it, with its name in the log and a count at the end.
        seed: Decides splits and, with the run's seed, the order of training.

    Attributes:
        classes: Names of the classes.
        num_classes: Their number.
        bad_images: Names of the images that were left out.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        image_size: int = 224,
        batch_size: int = 64,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        augment: Augment = "none",
        augment_args: dict[str, Any] | None = None,
        crop_pct: float = 1.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        on_bad: OnBad = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(image_size, batch_size, eval_batch_size) < 1:
            raise ValueError(
                f"sizes must be positive, got image_size={image_size}, batch_size={batch_size},"
                f" eval_batch_size={eval_batch_size}."
            )
        if on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', got {on_bad!r}.")
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct is a share in (0, 1], got {crop_pct}.")
        if (mixup > 0 or cutmix > 0) and batch_size < 2:
            raise ValueError("Mixup and CutMix mix pairs of images; they need a batch_size of at least 2.")
        self.image_size, self.batch_size, self.eval_batch_size = image_size, batch_size, eval_batch_size
        self.num_workers, self.crop_pct, self.on_bad, self.seed = num_workers, crop_pct, on_bad, seed
        self.mixup, self.cutmix, self.label_smoothing = mixup, cutmix, label_smoothing
        self.train_transform = train_transform(image_size, augment, augment_args)
        self.eval_transform = eval_transform(image_size, crop_pct)
        self.classes: list[str] = []
        self.bad_images: list[str] = []
        self._parts: dict[str, Part] = {}
        self._datasets: dict[str, Images] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        self.setup()
        return len(self.classes)

    def read_parts(self) -> tuple[dict[str, Part], list[str]]:
        """The parts by name, and the names of the classes; subclasses override this."""
        raise TypeError(f"{type(self).__name__} reads no data; use a subclass such as ImageFolder.")

    def setup(self, stage: str | None = None) -> None:
        """Find all images."""
        if not self._parts:
            self._parts, self.classes = self.read_parts()

    def dataset(self, part: PartName) -> Images:
        """One part as samples (image, label, number).

        Raises:
            ValueError: if there is no such part.
        """
        self.setup()
        if part not in self._parts:
            raise ValueError(f"This data set has no part {part!r}, only {', '.join(self._parts)}.")
        if part not in self._datasets:
            transform = self.train_transform if part == "train" else self.eval_transform
            self._datasets[part] = Images(self._parts[part], transform, self.on_bad)
        return self._datasets[part]

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """Training images in a seeded random order; a last batch that is not full is left out."""
        dataset = self.dataset("train")
        full = len(EpochSampler(dataset, shuffle=True)) >= self.batch_size  # of this process
        return self._loader(dataset, self.batch_size, shuffle=True, drop_last=full)

    def val_dataloader(self) -> DataLoader[ImageBatch] | list[DataLoader[ImageBatch]]:
        """Validation images in order; nothing in a fit on data without that part."""
        self.setup()
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and "val" not in self._parts:
            return []
        return self._loader(self.dataset("val"), self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[ImageBatch]:
        """Test images in order."""
        return self._loader(self.dataset("test"), self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[ImageBatch]:
        """The test images."""
        return self.test_dataloader()

    def _loader(self, dataset: Images, batch_size: int, **options: Any) -> DataLoader[ImageBatch]:
        return self.create_loader(dataset, batch_size, num_workers=self.num_workers, collate_fn=collate, **options)

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Name images that were left out; mix training images."""
        training = self.trainer is not None and self.trainer.training
        if len(batch.bad):
            stage = "train" if training else "test" if self.trainer is not None and self.trainer.testing else "val"
            self._note(stage, batch.bad.tolist())
        if training and (self.mixup > 0 or self.cutmix > 0):
            return self.mixed(batch)
        return batch

    def _note(self, part: str, numbers: Sequence[int]) -> None:
        for number in numbers:
            name = self._parts[part].names[number]
            if name not in self.bad_images:
                self.bad_images.append(name)
                log.warning("%s cannot be read and is left out (%d so far)", name, len(self.bad_images))

    def teardown(self, stage: str) -> None:
        """Say how many images were left out."""
        if self.bad_images:
            log.warning("%d images cannot be read and were left out", len(self.bad_images))

    def mixed(self, batch: ImageBatch) -> ImageBatch:
        """Mixup or CutMix of pairs, with soft labels; of an odd batch the last image is left out.

        Raises:
            ValueError: if the batch has fewer than two images.
        """
        count = len(batch.image) // 2 * 2
        if count == 0:
            raise ValueError("Mixup needs at least two images in a batch, got 1.")
        mix = Mixup(self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=self.num_classes)
        image, label = mix(batch.image[:count].clone(), batch.label[:count])
        return batch._replace(image=image, label=label, number=batch.number[:count])

    def state(self) -> dict[str, Any]:
        """What a saved model must know of its data, as plain JSON values."""
        self.setup()
        return {"classes": self.classes, "image_size": self.image_size, "crop_pct": self.crop_pct}


def split_off(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images that stay and of those that are split off, the share taken from each class.

    Raises:
        ValueError: if the share is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"a share of the training part must be in [0, 1), got {share}.")
    generator = torch.Generator().manual_seed(seed)
    off: list[int] = []
    for label in sorted(set(labels)):
        rows = [k for k, other in enumerate(labels) if other == label]
        order = torch.randperm(len(rows), generator=generator).tolist()
        off += [rows[k] for k in order[: round(share * len(rows))]]
    chosen = set(off)
    return [k for k in range(len(labels)) if k not in chosen], sorted(off)
