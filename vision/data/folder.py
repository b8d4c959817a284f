"""Images in folders, one per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import ImageData, Part, split_off
from .reading import read_class_folder, read_image


class ImageFolder(ImageData):
    """Images as ROOT/PART/CLASS/NAME.jpg.

    Args:
        root: The folder; with no folder `train` in it, its own subfolders are the classes.
        train: Name of the training part's folder.
        val: Of the validation part's; without it `val_share` is taken.
        test: Of the test part's, if it is there.
        val_share: Share of each class's training images for validation, where there is no folder for it.
        allow_empty: Take classes without images.
        options: Further options of `ImageData`.
    """

    def __init__(
        self,
        root: str | Path,
        train: str = "train",
        val: str = "val",
        test: str = "test",
        val_share: float = 0.1,
        allow_empty: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root, self.folders = Path(root), {"train": train, "val": val, "test": test}
        self.val_share, self.allow_empty = val_share, allow_empty

    def read_parts(self) -> tuple[dict[str, Part], list[str]]:
        """Parts and classes, from the names of files and folders."""
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{str(self.root)!r} does not exist; expected images as {self.root}/train/CLASS/NAME.jpg."
            )
        first = self.root / self.folders["train"]
        whole = not first.is_dir()
        part, classes = self._read(self.root if whole else first, None)
        parts = {"train": part}
        for name in () if whole else ("val", "test"):
            if (self.root / self.folders[name]).is_dir():
                parts[name], _ = self._read(self.root / self.folders[name], classes)
        if "val" not in parts and self.val_share > 0:
            stay, off = split_off(part.labels, self.val_share, self.seed)
            parts |= {"train": part.take(stay), "val": part.take(off)}
        return parts, classes

    def _read(self, folder: Path, classes: list[str] | None) -> tuple[Part, list[str]]:
        paths, labels, names = read_class_folder(folder, classes, allow_empty=self.allow_empty)
        return Part(_Reader(paths), labels, [str(path) for path in paths]), names


class _Reader:
    """Reads image k of a list of files; a class, so that worker processes can receive it."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __call__(self, k: int) -> Any:
        return read_image(self.paths[k])
