"""Images with boxes, from annotation files in COCO's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .coco_file import CocoFile, Record, read_coco
from .dense_base import DenseData, Pictures
from .dense_batches import collate_boxes
from .joint import as_float
from .reading import UNREADABLE, read_image


class CocoBoxes(DenseData):
    """Boxes in COCO's JSON layout.

    Gaps in the numbers of images and categories, images without boxes and crowd regions are as they should be. Boxes
    without area are left out, boxes that leave the image are cut; both are counted in `counts`. Missing images,
    annotations of unknown images or categories, and files of another size than announced are faults, see `on_bad`.

    Args:
        root: Folder of the annotation files.
        images: Folder of the images, in ROOT.
        train: Annotation file of the training part, in ROOT.
        val: Of the validation part.
        test: Of the test part; those that are not there are left out.
        options: Further options of `DenseData`; classes are those of the training part.

    Attributes:
        categories: Number in the files of each class.
    """

    collate = staticmethod(collate_boxes)

    def __init__(
        self,
        root: str | Path,
        images: str = "images",
        train: str = "train.json",
        val: str = "val.json",
        test: str = "test.json",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root, self.images = Path(root), images
        self.files = {"train": train, "val": val, "test": test}
        self.categories: list[int] = []

    def read_parts(self) -> dict[str, Dataset]:
        """One part for each annotation file that is there."""
        if not (self.root / self.files["train"]).is_file():
            raise FileNotFoundError(
                f"{str(self.root / self.files['train'])!r} does not exist; expected annotations in COCO's layout as"
                f" {self.root}/{self.files['train']} and images in {self.root}/{self.images}."
            )
        read: dict[str, CocoFile] = {}
        for name, file in self.files.items():
            if (self.root / file).is_file():
                folder = self.root / self.images
                read[name] = read_coco(self.root / file, folder, self.fault, self.note, read.get("train"))
                read[name].records = [record for record in read[name].records if self._as_announced(record)]
        if not any(record.boxes for record in read["train"].records):
            raise ValueError(f"{self.root / self.files['train']} holds no box to learn from.")
        self.categories, self.classes = read["train"].categories, read["train"].classes
        return {
            name: Boxes(file.records, self, self.train_view if name == "train" else None) for name, file in read.items()
        }

    def _as_announced(self, record: Record) -> bool:
        try:
            if self.on_bad == "skip":  # what is damaged behind the head would end the training
                found = read_image(record.path).size
            else:
                with Image.open(record.path) as image:
                    found = image.size
        except UNREADABLE as error:
            self.fault("cannot be read", str(record.path), f"{error}; replace it")
            return False
        if found == (record.width, record.height):
            return True
        sizes = f"{found[0]} x {found[1]}, announced {record.width} x {record.height}"
        self.fault("image of another size than announced", f"{record.path} ({sizes})", "Correct the annotation file")
        return False

    def state(self) -> dict[str, Any]:
        """Classes, their numbers in the files, and the size of images."""
        return {**super().state(), "categories": self.categories}


class Boxes(Dataset):
    """Samples (image, target, original size, number); a target has boxes, labels, crowd and area.

    Args:
        records: What the annotation file says.
        data: Whose options hold.
        view: Transform of training samples, from which crowd regions are left out; None for evaluation.
    """

    def __init__(self, records: list[Record], data: DenseData, view: Any = None) -> None:
        self.records = records
        self.pictures = Pictures([record.path for record in records], data.in_memory)
        self.view, self.fit = view, data.eval_view

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, k: int) -> tuple[Tensor, dict[str, Any], tuple[int, int], int]:
        """One sample."""
        record, size = self.records[k], (self.records[k].height, self.records[k].width)
        target = {
            "boxes": torch.tensor(record.boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(record.labels, dtype=torch.int64),
            "crowd": torch.tensor(record.crowd, dtype=torch.bool),
            "area": torch.tensor(record.area, dtype=torch.float32),
        }
        if self.view is not None:
            target = {name: value[~target["crowd"]] for name, value in target.items()}
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        image, target = (self.view or self.fit)(self.pictures(k), target)
        return as_float(image), target, size, k
