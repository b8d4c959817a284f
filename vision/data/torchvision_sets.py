"""Sets that torchvision knows: CIFAR, MNIST and their like."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torchvision import datasets

from .base import ImageData, Part, split_off

Name = Literal["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST"]


class _Reader:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, k: int) -> Image.Image:
        return self.dataset[k][0].convert("RGB")


class TorchvisionSet(ImageData):
    """A set of `torchvision.datasets` with a training and a test part.

    Args:
        name: Its class there.
        root: Folder with its files, as torchvision lays them out.
        download: Fetch them if they are missing.
        val_share: Share of each class's training images for validation.
        options: Further options of `ImageData`.
    """

    def __init__(
        self,
        name: Name = "CIFAR10",
        root: str | Path = "data",
        download: bool = False,
        val_share: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.set_name, self.root, self.download, self.val_share = name, Path(root), download, val_share

    def read_parts(self) -> tuple[dict[str, Part], list[str]]:
        """Parts and classes of the set.

        Raises:
            FileNotFoundError: if its files are missing and `download` is off.
        """
        create = getattr(datasets, self.set_name)
        try:
            train, test = (create(self.root, train=train, download=self.download) for train in (True, False))
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{self.set_name} is not below {str(self.root)!r} ({error}). Put it there or set download=True."
            ) from error
        parts = {"train": _part(train, f"{self.set_name}/train"), "test": _part(test, f"{self.set_name}/test")}
        if self.val_share > 0:
            stay, off = split_off(parts["train"].labels, self.val_share, self.seed)
            parts |= {"train": parts["train"].take(stay), "val": parts["train"].take(off)}
        return parts, [str(name) for name in train.classes]


def _part(dataset: Any, name: str) -> Part:
    labels = [int(label) for label in dataset.targets]
    return Part(_Reader(dataset), labels, [f"{name}/{k}" for k in range(len(labels))])
