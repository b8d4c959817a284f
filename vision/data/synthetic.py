"""Small learnable images without files: for tests, smoke runs and examples.

quadrant   noise with one quadrant brighter; the label is which
signal     k x k patches of noise; one of them, anywhere, has a fixed sparse pattern added or subtracted, and the label
           is its sign: only a model that looks locally and alike everywhere learns it from few samples
           (dynamic signal distribution, Lahoti, Karp et al. 2024)
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image

from .base import ImageData, Part

Kind = Literal["quadrant", "signal"]
CLASSES = {"quadrant": ["top left", "top right", "bottom left", "bottom right"], "signal": ["minus", "plus"]}


def create_images(
    kind: str, count: int, size: int, patches: int = 4, strength: float = 8.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, size, size, 3) uint8 and labels (count,), the same for the same seed.

    Args:
        kind: "quadrant" or "signal".
        count: Number of images.
        size: Side, pixels; for "signal" a multiple of `patches`.
        patches: Patches along each side ("signal").
        strength: Norm of the pattern in standard deviations of a pixel ("signal").
        seed: Of images and labels; the pattern is always the same.

    Raises:
        ValueError: for an unknown kind or a size that does not fit.
    """
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, size, size, 3))
    if kind == "quadrant":
        labels = rng.integers(4, size=count)
        half = size // 2
        for image, label in zip(values, labels, strict=True):
            image[label // 2 * half :, label % 2 * half :][:half, :half] += 2
    elif kind == "signal":
        if size % patches:
            raise ValueError(f"size must be a multiple of patches={patches}, got {size}.")
        side = size // patches
        pattern = np.zeros(side * side * 3)
        fixed = np.random.default_rng(20240)
        chosen = fixed.choice(pattern.size, max(1, pattern.size // 16), replace=False)
        pattern[chosen] = fixed.choice([-1, 1], len(chosen)) * strength / np.sqrt(len(chosen))
        labels = rng.integers(2, size=count)
        for image, label, (i, j) in zip(values, labels, rng.integers(patches, size=(count, 2)), strict=True):
            image[i * side : (i + 1) * side, j * side : (j + 1) * side] += (2 * label - 1) * pattern.reshape(
                side, side, 3
            )
    else:
        raise ValueError(f"Unknown synthetic set {kind!r}; expected one of {', '.join(CLASSES)}.")
    return np.clip(128 + 32 * values, 0, 255).astype(np.uint8), labels


class _Reader:
    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __call__(self, k: int) -> Image.Image:
        return Image.fromarray(self.images[k])


class SyntheticImages(ImageData):
    """A synthetic set.

    Args:
        kind: "quadrant" or "signal".
        image_size: Side of the images, pixels.
        train_samples: Training images.
        val_samples: Validation images, and as many for the test.
        patches: Patches along each side ("signal").
        strength: Norm of the pattern in standard deviations of a pixel ("signal").
        data_seed: Seed of the images; `seed` is that of the training order.
        options: Further options of `ImageData`.
    """

    def __init__(
        self,
        kind: Kind = "quadrant",
        image_size: int = 32,
        train_samples: int = 512,
        val_samples: int = 128,
        patches: int = 4,
        strength: float = 8.0,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(image_size=image_size, **options)
        if kind not in CLASSES:
            raise ValueError(f"Unknown synthetic set {kind!r}; expected one of {', '.join(CLASSES)}.")
        self.kind, self.patches, self.strength, self.data_seed = kind, patches, strength, data_seed
        self.counts = {"train": train_samples, "val": val_samples, "test": val_samples}

    def read_parts(self) -> tuple[dict[str, Part], list[str]]:
        """The generated images."""
        parts = {}
        for number, (name, count) in enumerate(self.counts.items()):
            images, labels = create_images(
                self.kind, count, self.image_size, self.patches, self.strength, 3 * self.data_seed + number
            )
            names = [f"{self.kind}/{name}/{k}" for k in range(count)]
            parts[name] = Part(_Reader(images), [int(label) for label in labels], names)
        return parts, CLASSES[self.kind]
