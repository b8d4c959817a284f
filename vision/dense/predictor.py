"""Trained segmenters and detectors out of folders and checkpoints, and what they find in new images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...ssmcore.training.checkpoints import ModelFolder, load_weights
from ...ssmcore.training.devices import find_device
from ..classifier import stored_model
from ..data.dense_base import picture
from ..data.joint import View, as_float, fitted_size
from ..data.reading import BadImageError
from ..tasks import normalized
from .detectors import Found, as_found, create_detector
from .segmenter import create_segmenter, slide, unfitted

Kind = Literal["segmentation", "detection"]


@dataclass(frozen=True)
class DensePrediction:
    """What is found in one image.

    Attributes:
        path: The file.
        image: Its bytes, (3, height, width); None if it cannot be read.
        found: Boxes of a detector, in pixels of the image.
        mask: Classes of a segmenter, (height, width) uint8.
        error: Why the file cannot be read, else "".
    """

    path: Path
    image: Tensor | None
    found: Found | None = None
    mask: Tensor | None = None
    error: str = ""


@dataclass(frozen=True)
class DenseModel:
    """A trained network with what it must know of its images.

    Attributes:
        kind: "segmentation" or "detection".
        net: The network, in evaluation mode.
        classes: Names of the classes.
        image_size: Rows and columns of the images that it sees.
        split: How the images of a folder were split for its training, as options of `MaskFolder`.
    """

    kind: Kind
    net: nn.Module
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    split: dict[str, Any] = field(default_factory=dict)

    @torch.inference_mode()
    def boxes(self, image: Tensor, threshold: float = 0.3) -> Found:
        """Boxes of an image of bytes (3, height, width), in its pixels.

        Args:
            image: Of any size.
            threshold: Least score.
        """
        size = (image.shape[-2], image.shape[-1])
        found = self.net.detect(self._seen(image), threshold)[0]  # type: ignore[operator]
        rows, columns = fitted_size(*size, self.image_size)
        factor = torch.tensor([columns / size[1], rows / size[0]])
        return Found(*(values.cpu() for values in as_found(found, factor, size)))

    @torch.inference_mode()
    def mask(self, image: Tensor, window: bool = False) -> Tensor:
        """Classes of an image of bytes (3, height, width), as (height, width) uint8.

        Args:
            image: Of any size.
            window: Keep the image's resolution and look at it through overlapping windows of the training size,
                instead of resizing the whole of it.
        """
        size = (image.shape[-2], image.shape[-1])
        if window:
            place = next(self.net.parameters())
            whole = normalized(as_float(image)[None].to(place.device), self.net)[0]
            logits = slide(self.net, whole, self.image_size)
        else:
            logits = unfitted(self.net(self._seen(image))[0].float(), size)
        return logits.argmax(0).to(torch.uint8).cpu()

    def _seen(self, image: Tensor) -> Tensor:
        fitted, _ = View(self.image_size)(image, {})
        return normalized(as_float(fitted)[None].to(next(self.net.parameters()).device), self.net)

    def predict(
        self, paths: Sequence[Path], *, threshold: float = 0.3, window: bool = False, on_bad: str = "raise"
    ) -> Iterator[DensePrediction]:
        """Boxes or masks of image files, in their order.

        Args:
            paths: The files.
            threshold: Least score of a box.
            window: See `mask`.
            on_bad: "raise" at a file that cannot be read, or "skip" it with its reason in `error`.

        Raises:
            BadImageError: for a file that cannot be read, with on_bad="raise".
        """
        for path in paths:
            try:
                image = picture(path)
            except BadImageError as error:
                if on_bad == "raise":
                    raise
                yield DensePrediction(path, None, error=str(error))
                continue
            if self.kind == "detection":
                yield DensePrediction(path, image, found=self.boxes(image, threshold))
            else:
                yield DensePrediction(path, image, mask=self.mask(image, window))


def load(checkpoint: str | Path | ModelFolder, device: str | torch.device = "cpu") -> DenseModel:
    """Read a model folder, a run's folder or a .ckpt file of a segmenter or detector.

    Args:
        checkpoint: Where it is, or what was read from there.
        device: Where the network goes.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is another model, or the device is not there.
    """
    place = find_device(device)
    stored = checkpoint if isinstance(checkpoint, ModelFolder) else stored_model(checkpoint)
    kind = stored.config.get("task", {}).get("kind")
    if kind not in ("segmentation", "detection") or "data.json" not in stored.files:
        model = stored.config.get("model")
        raise ValueError(f"{str(stored.path)!r} holds {model!r}, expected a segmenter or a detector.")
    data = json.loads(stored.files["data.json"])
    create = create_segmenter if kind == "segmentation" else create_detector
    net = create(**stored.config["args"])
    load_weights(net, stored.state, source=str(stored.path))
    rows, columns = data["image_size"]
    return DenseModel(kind, net.to(place).eval(), tuple(data["classes"]), (rows, columns), data.get("split", {}))
