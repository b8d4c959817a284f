"""The batch of all vision data, and what makes one out of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ImageBatch(NamedTuple):
    """One batch of images.

    Attributes:
        image: (batch, channels, height, width) float32 in [0, 1], not normalised: the task does that as its model
            wants it.
        label: (batch,) int64, -1 where unknown; or (batch, classes) float32 after Mixup.
        number: Numbers of the images in their data set, (batch,) int64.
        bad: Numbers of the images that could not be read and are left out, (k,) int64.
    """

    image: Tensor
    label: Tensor
    number: Tensor
    bad: Tensor


Sample = tuple[Tensor | None, int, int]  # image (None: could not be read), label, number


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Samples as a batch, without those that could not be read.

    Raises:
        ValueError: if none could be read, or images differ in size.
    """
    good = [(image, label, index) for image, label, index in samples if image is not None]
    if not good:
        raise ValueError(f"none of the {len(samples)} images of a batch could be read; see the names above.")
    images, labels, indices = zip(*good, strict=True)
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise ValueError(f"images of one batch need one size, got {sorted(sizes)}; set image_size.")
    return ImageBatch(
        torch.stack(images),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor([index for image, _, index in samples if image is None], dtype=torch.int64),
    )
