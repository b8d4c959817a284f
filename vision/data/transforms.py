"""From pictures to tensors: timm's augmentation, a light one for small images, and the evaluation crop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

Augment = Literal["none", "light", "imagenet"]
Transform = Callable[[Image.Image], Tensor]

LIGHT = {"shift": 0.09375, "flip": 0.5, "brightness": 0.2, "contrast": 0.2}  # 6 of 64 pixels
# timm normalises where it makes tensors of float; these leave values as they are.
_PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
IMAGENET: dict[str, Any] = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.25,
    "re_mode": "pixel",
    "interpolation": "bicubic",
}


def train_transform(image_size: int, augment: Augment, options: dict[str, Any] | None = None) -> Transform:
    """Augmentation of the training part; values stay in [0, 1].

    Args:
        image_size: Side of the result, pixels.
        augment: "none" resizes; "light" shifts, flips and changes brightness and contrast a little; "imagenet" is
            timm's random resized crop with RandAugment and erasing.
        options: Of "light": shift (share of the side), flip (probability), brightness, contrast; of "imagenet": those
            of `timm.data.create_transform`.

    Raises:
        ValueError: if the name or an option is unknown.
    """
    options = options or {}
    if augment == "imagenet":
        return create_transform(image_size, is_training=True, **{**_PLAIN, **IMAGENET, **options})
    if augment == "none":
        if options:
            raise ValueError(f"augment='none' takes no options, got {', '.join(options)}.")
        return _resized(image_size)
    if augment != "light":
        raise ValueError(f"augment must be none, light or imagenet, got {augment!r}.")
    unknown = sorted(set(options) - set(LIGHT))
    if unknown:
        raise ValueError(f"augment='light' has no option {unknown[0]!r}; it has {', '.join(LIGHT)}.")
    values = {**LIGHT, **options}
    return transforms.Compose(
        [
            transforms.Resize((image_size, image_size), antialias=True),
            transforms.RandomCrop(image_size, padding=round(values["shift"] * image_size)),
            transforms.RandomHorizontalFlip(values["flip"]),
            transforms.ColorJitter(values["brightness"], values["contrast"]),
            transforms.ToTensor(),
        ]
    )


def eval_transform(image_size: int, crop_pct: float = 1.0) -> Transform:
    """Resize the shorter side to `image_size / crop_pct` and take the middle; values in [0, 1]."""
    return create_transform(image_size, is_training=False, interpolation="bicubic", crop_pct=crop_pct, **_PLAIN)


def _resized(image_size: int) -> Transform:
    return transforms.Compose([transforms.Resize((image_size, image_size), antialias=True), transforms.ToTensor()])
