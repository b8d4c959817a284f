"""Batches of images with masks or boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = 255  # label of pixels that count neither for the loss nor for the metrics


class SegmentationBatch(NamedTuple):
    """Images with a class for each pixel.

    Attributes:
        image: (b, 3, height, width) float32 in [0, 1], fitted into one size and filled up below and on the right.
        mask: (b, rows, columns) int64, 255 where nothing is known. In training of the image's size and place; else of
            the original images' size, filled up with 255.
        size: Rows and columns of the original images, (b, 2) int64.
        number: Numbers of the images in their data set, (b,) int64.
    """

    image: Tensor
    mask: Tensor
    size: Tensor
    number: Tensor


class DetectionBatch(NamedTuple):
    """Images with boxes, m of them at most.

    Attributes:
        image: (b, 3, height, width) float32 in [0, 1], fitted into one size and filled up below and on the right.
        boxes: Corners (x0, y0, x1, y1) in pixels of `image`, (b, m, 4) float32.
        labels: Classes, (b, m) int64, -1 behind the last box of an image.
        crowd: Boxes around many objects, (b, m) bool: none in training, and not counted in evaluation.
        area: Of the objects in pixels of the original images, (b, m) float32.
        size: Rows and columns of the original images, (b, 2) int64.
        number: Numbers of the images in their data set, (b,) int64.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    area: Tensor
    size: Tensor
    number: Tensor


def collate_masks(samples: Sequence[tuple[Tensor, Tensor, tuple[int, int], int]]) -> SegmentationBatch:
    """Samples (image, mask, original size, number) as a batch."""
    images, masks, sizes, numbers = zip(*samples, strict=True)
    rows, columns = (max(mask.shape[axis] for mask in masks) for axis in (0, 1))
    mask = torch.full((len(masks), rows, columns), IGNORE, dtype=torch.int64)
    for k, one in enumerate(masks):
        mask[k, : one.shape[0], : one.shape[1]] = one
    return SegmentationBatch(torch.stack(images), mask, torch.tensor(sizes), torch.tensor(numbers))


def collate_boxes(samples: Sequence[tuple[Tensor, dict[str, Any], tuple[int, int], int]]) -> DetectionBatch:
    """Samples (image, target, original size, number) as a batch."""
    images, targets, sizes, numbers = zip(*samples, strict=True)
    count, most = len(targets), max(len(target["labels"]) for target in targets)
    boxes, area = torch.zeros(count, most, 4), torch.zeros(count, most)
    labels = torch.full((count, most), -1, dtype=torch.int64)
    crowd = torch.zeros(count, most, dtype=torch.bool)
    for k, target in enumerate(targets):
        held = len(target["labels"])
        boxes[k, :held] = target["boxes"].as_subclass(Tensor)
        labels[k, :held], crowd[k, :held], area[k, :held] = target["labels"], target["crowd"], target["area"]
    return DetectionBatch(torch.stack(images), boxes, labels, crowd, area, torch.tensor(sizes), torch.tensor(numbers))
