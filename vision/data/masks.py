"""Images with masks in folders: IMAGES/NAME.jpg and MASKS/NAME.png, a class number in each pixel of the latter."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .base import split_off
from .dense_base import DenseData, Pictures
from .dense_batches import IGNORE, collate_masks
from .joint import as_float
from .reading import SUFFIXES, UNREADABLE, BadImageError, read_image


class MaskFolder(DenseData):
    """Images and masks of equal names in two folders.

    The parts are ROOT/train, ROOT/val and ROOT/test, each with the two folders. Where they are missing, the two
    folders lie in ROOT itself and a table says which part each image belongs to, or a share is split off.

    Args:
        root: The folder.
        classes: Names of the classes 0, 1, ...; 255 in a mask means unknown.
        images: Name of the folder of images.
        masks: Of that of masks: one channel of 8 bits, or a palette.
        table: CSV file in ROOT with columns `id` (name without ending) and `split` (train, val or test).
        val_share: Share of the images for validation, where neither folders nor a table say.
        options: Further options of `DenseData`.
    """

    collate = staticmethod(collate_masks)

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        images: str = "images",
        masks: str = "masks",
        table: str = "labels.csv",
        val_share: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(classes, **options)
        if not 1 < len(self.classes) < IGNORE:
            raise ValueError(f"a segmentation needs 2 to {IGNORE - 1} classes, got {len(self.classes)}.")
        self.root, self.images, self.masks, self.table = Path(root), images, masks, table
        self.val_share = val_share

    def read_parts(self) -> dict[str, Dataset]:
        """Parts from folders, from the table, or by a share."""
        layout = f"expected images as {self.root}/{self.images}/NAME.jpg and masks as {self.root}/{self.masks}/NAME.png"
        if not self.root.is_dir():
            kind = "is no folder" if self.root.exists() else "does not exist"
            raise FileNotFoundError(f"{str(self.root)!r} {kind}; {layout}.")
        folders = [name for name in ("train", "val", "test") if (self.root / name / self.images).is_dir()]
        if "train" in folders:
            found = {name: self._pairs(self.root / name) for name in folders}
        elif (self.root / self.images).is_dir():
            found = self._split(self._pairs(self.root))
        else:
            raise FileNotFoundError(f"{str(self.root / self.images)!r} does not exist; {layout}.")
        return {
            name: Masks(pairs, self, self.train_view if name == "train" else None)
            for name, pairs in found.items()
            if pairs
        }

    def _pairs(self, folder: Path) -> list[tuple[Path, Path]]:
        """Images with their masks, checked."""
        masks = _by_name(_files(folder / self.masks))
        images = _by_name(_files(folder / self.images))
        for name in sorted(set(masks) - set(images)):
            self.note("mask without an image left out", str(masks[name]))
        pairs = []
        for path in images.values():
            if path.stem not in masks:
                self.fault("image without a mask", str(path), f"Expected {folder / self.masks / path.stem}.png")
                continue
            try:
                size = read_image(path).size
                mask = read_mask(masks[path.stem])
            except BadImageError as error:
                if self.on_bad == "raise":
                    raise
                self.note("cannot be read", str(error))
                continue
            if (mask.shape[1], mask.shape[0]) != size:
                sizes = f"{size[0]} x {size[1]} and {mask.shape[1]} x {mask.shape[0]}"
                self.fault("image and mask differ in size", f"{masks[path.stem]} ({sizes})", "Resize the mask")
                continue
            largest = int(mask[mask != IGNORE].max()) if bool((mask != IGNORE).any()) else 0
            if largest >= len(self.classes):
                place = f"{masks[path.stem]} (class {largest} of {len(self.classes)})"
                self.fault("mask with an unknown class", place, "Name all classes, and mark unknown pixels by 255")
                continue
            pairs.append((path, masks[path.stem]))
        if not pairs:
            raise ValueError(f"{str(folder)!r} holds no image with a mask of the same name.")
        return pairs

    def _split(self, pairs: list[tuple[Path, Path]]) -> dict[str, list[tuple[Path, Path]]]:
        table = self.root / self.table
        if not table.is_file():
            stay, off = split_off([0] * len(pairs), self.val_share, self.seed)
            return {"train": [pairs[k] for k in stay], "val": [pairs[k] for k in off]}
        part = _read_split(table)
        unknown = sorted(set(part.values()) - {"train", "val", "test"})
        if unknown:
            raise ValueError(f"{table} has the split {unknown[0]!r}; expected train, val or test.")
        for path, _ in pairs:
            if path.stem not in part:
                self.fault(f"not in {table.name}", str(path), "Add it to the table")
        return {name: [pair for pair in pairs if part.get(pair[0].stem) == name] for name in ("train", "val", "test")}

    def state(self) -> dict[str, Any]:
        """Classes, the size of images, and how they were split, so that an evaluation sees none of the training."""
        split = {"table": self.table, "val_share": self.val_share, "seed": self.seed}
        return {**super().state(), "split": split}


def _read_split(table: Path) -> dict[str, str]:
    """Part of each image by the columns id and split of a table."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is no table in text: {error}.") from error
    names = rows[0] if rows else []
    if names.count("id") != 1 or names.count("split") != 1 or len(rows) < 2:
        raise ValueError(f"{table} needs rows with the columns id and split, got {', '.join(names) or 'nothing'}.")
    part: dict[str, str] = {}
    for row in rows[1:]:
        if len(row) != len(names):
            raise ValueError(f"{table} has a row of {len(row)} fields, expected {len(names)}: {','.join(row)[:80]}")
        name = row[names.index("id")]
        if name in part:
            raise ValueError(f"{table} names {name!r} twice.")
        part[name] = row[names.index("split")]
    return part


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(2, "No such folder", str(folder))
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise ValueError(f"{path.parent} has {found[path.stem].name} and {path.name}; names need different stems.")
        found[path.stem] = path
    return found


def read_mask(path: Path) -> Tensor:
    """Class numbers of a mask file, (height, width) uint8; of a palette image the numbers, not the colours.

    Raises:
        BadImageError: if it cannot be read or has several channels.
    """
    try:
        with Image.open(path) as image:
            image.load()
            mode, values = image.mode, np.asarray(image)
    except UNREADABLE as error:
        raise BadImageError(f"{str(path)!r} cannot be read: {str(error) or 'memory is full'}") from error
    if mode == "1":
        values = values.astype(np.uint8)
    if mode not in ("L", "P", "1"):
        raise BadImageError(f"{str(path)!r} is an image of mode {mode}, expected class numbers in 8 bits (L or P).")
    return torch.from_numpy(values.copy())


class Masks(Dataset):
    """Samples (image, mask, original size, number).

    Args:
        pairs: Files of images and masks.
        data: Whose options hold.
        view: Transform of training samples; None leaves masks at their size.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], data: DenseData, view: Any = None) -> None:
        self.paths = [path for path, _ in pairs]
        self.pictures = Pictures(self.paths, data.in_memory)
        self.mask_paths = [mask for _, mask in pairs]
        keep = self.pictures.kept is not None
        self.kept = [read_mask(mask) for mask in self.mask_paths] if keep else None
        self.view, self.fit = view, data.eval_view

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, tuple[int, int], int]:
        """One sample."""
        values = self.kept[k] if self.kept is not None else read_mask(self.mask_paths[k])
        image, mask = self.pictures(k), tv_tensors.Mask(values)
        size = (image.shape[-2], image.shape[-1])
        if self.view is None:
            fitted, _ = self.fit(image, {})
            return as_float(fitted), mask.as_subclass(Tensor).long(), size, k
        image, target = self.view(image, {"mask": mask})
        return as_float(image), target["mask"].as_subclass(Tensor).long(), size, k
