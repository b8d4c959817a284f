"""Detectors behind one interface: losses of a batch, and boxes of images.

`create_detector` builds Mamba-YOLO, its neck and head on another pyramid, or a detector of torchvision, with its own
backbone or with a pyramid of ours or timm's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FeaturePyramidNetwork, batched_nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ..registry import options_of
from .assignment import detection_loss
from .features import Features
from .yolo import Raw, Yolo, decoded


class Found(NamedTuple):
    """Boxes found in one image, surest first.

    Attributes:
        boxes: Corners (x0, y0, x1, y1) in pixels, (k, 4).
        scores: In [0, 1], (k,).
        labels: Classes, (k,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class YoloDetector(nn.Module):
    """Mamba-YOLO's neck and head, trained with task-aligned assignment.

    Args:
        backbone: As for `Yolo`.
        num_classes: Classes.
        nms: Overlap from which of two boxes of a class the surer one is kept.
        most: Boxes per image.
        gains: Changed weights of the losses score, box and distribution.
        options: Others of `Yolo`.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        nms: float = 0.7,
        most: int = 300,
        gains: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.yolo = Yolo(backbone, num_classes, **options)
        self.default_cfg = self.yolo.default_cfg
        self.nms, self.most = nms, most
        weights = {"score": 0.5, "box": 7.5, "distribution": 1.5}
        unknown = sorted(set(gains or {}) - set(weights))
        if unknown:
            raise ValueError(f"there is no loss {unknown[0]!r} to weigh by gains, only {', '.join(weights)}.")
        if not 0 <= nms <= 1 or most < 1:
            raise ValueError(f"nms is an overlap in [0, 1] and most at least 1, got {nms} and {most}.")
        self.gains = {**weights, **(gains or {})}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (b, A, 4) in pixels and scores (b, A, classes) of all cells, before any choice; what is exported."""
        raw: Raw = self.yolo(x)
        return decoded(raw), raw.scores.float().sigmoid()

    def losses(self, x: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Weighted losses of normalised images with boxes (b, m, 4) and labels (b, m), -1 for none."""
        parts = detection_loss(self.yolo(x), boxes, labels)
        return {name: self.gains[name] * value for name, value in parts.items()}

    def detect(self, x: Tensor, threshold: float) -> list[Found]:
        """Boxes of normalised images with a score of at least `threshold`."""
        boxes, scores = self(x)
        return [choose(b, s, threshold, self.nms, self.most) for b, s in zip(boxes, scores)]


def choose(boxes: Tensor, scores: Tensor, threshold: float, nms: float, most: int) -> Found:
    """Of all cells those that are sure enough and overlap none that is surer.

    Args:
        boxes: Corners, (A, 4).
        scores: Of each class, (A, classes); a cell may count for several.
        threshold: Least score.
        nms: Largest overlap within a class.
        most: Boxes at most.
    """
    cell, label = (scores >= threshold).nonzero(as_tuple=True)
    value = scores[cell, label]
    if len(value) > 30 * most:
        value, first = value.topk(30 * most)
        cell, label = cell[first], label[first]
    kept = batched_nms(boxes[cell], value, label, nms)[:most]
    return Found(boxes[cell[kept]], value[kept], label[kept])


class TorchvisionDetector(nn.Module):
    """A detector of torchvision without weights. Its class 0 is the background, here left out.

    Args:
        name: Of a model of `torchvision.models.detection`, such as "ssdlite320_mobilenet_v3_large"; or "fcos",
            "retinanet" or "faster_rcnn" for that detector on a pyramid.
        num_classes: Classes without background.
        image_size: Rows and columns of the images that come, so that they are not resized again.
        backbone: Of the pyramid, for the three short names.
        backbone_args: Its options.
        width: Channels of the feature pyramid.
        options: Further ones of torchvision's model.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        image_size: tuple[int, int] = (512, 512),
        backbone: str | None = None,
        backbone_args: dict[str, Any] | None = None,
        width: int = 128,
        **options: Any,
    ) -> None:
        super().__init__()
        self.plus = 0 if name.startswith(("fcos", "retinanet")) else 1
        self.least = float(options.get("score_thresh", options.get("box_score_thresh", 0)))
        plain: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        self.default_cfg: Any = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        count = num_classes + self.plus
        if name in PYRAMID_DETECTORS:
            if backbone is None:
                raise ValueError(f"detector {name!r} stands on a pyramid; name its backbone.")
            body = pyramid_backbone(backbone, backbone_args, width, more=self.plus == 0)
            self.default_cfg = body.features.default_cfg
            sizes: dict[str, Any] = {"min_size": min(image_size), "max_size": max(image_size)}
            if self.plus:
                options = {"rpn_anchor_generator": _anchors(len(body.features.strides)), **options}
            self.body = PYRAMID_DETECTORS[name](body, count, **sizes, **plain, **options)
        else:
            known = [known for known in _names() if not known.startswith(("keypoint", "mask"))]
            if name not in known:
                names = ", ".join(["yolo", *PYRAMID_DETECTORS, *known])
                raise ValueError(f"unknown detector {name!r}; expected {names}.")
            if backbone is not None:
                raise ValueError(f"detector {name!r} has its own backbone; leave out backbone={backbone!r}.")
            if not name.startswith("ssd"):
                plain |= {"min_size": min(image_size), "max_size": max(image_size)}
            maker = getattr(detection, name)
            self.body = maker(weights=None, weights_backbone=None, num_classes=count, **plain, **options)

    def losses(self, x: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """As `YoloDetector.losses`."""
        held = [label >= 0 for label in labels]
        targets = [{"boxes": b[h], "labels": n[h] + self.plus} for b, n, h in zip(boxes, labels, held)]
        return self.body(list(x), targets)

    def detect(self, x: Tensor, threshold: float) -> list[Found]:
        """As `YoloDetector.detect`, and of at least the score that the options name."""
        # torchvision leaves boxes below a score of its own choice out, which would cut off precision at low scores
        getattr(self.body, "roi_heads", self.body).score_thresh = max(threshold, self.least)  # type: ignore[union-attr]
        found = []
        for one in self.body(list(x)):
            sure = one["scores"] >= threshold
            order = one["scores"][sure].argsort(descending=True)
            values = (one["boxes"][sure][order], one["scores"][sure][order], one["labels"][sure][order] - self.plus)
            found.append(Found(*values))
        return found

    def forward(self, x: Tensor) -> list[Found]:
        """All boxes."""
        return self.detect(x, 0.0)


PYRAMID_DETECTORS: dict[str, type[nn.Module]] = {
    "fcos": detection.FCOS,
    "retinanet": detection.RetinaNet,
    "faster_rcnn": detection.FasterRCNN,
}


class PyramidBackbone(nn.Module):
    """Maps of one width by name, as torchvision's detectors want them.

    Args:
        features: The levels.
        width: Channels of all maps that go out.
        more: Two coarser levels by strided convolutions (one-stage detectors) instead of one by pooling.
    """

    def __init__(self, features: Features, width: int, more: bool) -> None:
        super().__init__()
        self.features, self.out_channels = features, width
        extra = LastLevelP6P7(width, width) if more else LastLevelMaxPool()
        self.pyramid = FeaturePyramidNetwork(features.channels, width, extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (batch, 3, height, width) to maps, finest first."""
        return self.pyramid(OrderedDict((str(k), level) for k, level in enumerate(self.features(x))))


def pyramid_backbone(
    backbone: str, backbone_args: dict[str, Any] | None = None, width: int = 256, more: bool = False
) -> PyramidBackbone:
    """Any pyramid of ours or timm's, or a token model, as the backbone of a detector of torchvision.

    Args:
        backbone: Name of the model.
        backbone_args: Its options.
        width: Channels of all levels.
        more: For FCOS and RetinaNet (levels 8 to 128); else for Faster and Mask R-CNN (levels 4 to 64).

    Example:
        `torchvision.models.detection.MaskRCNN(pyramid_backbone("vmamba_tiny_s1l8"), 91)`
    """
    return PyramidBackbone(Features(backbone, backbone_args, least_stride=8 if more else 4), width, more)


def _anchors(levels: int) -> nn.Module:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    sizes = tuple((2 ** (5 + k),) for k in range(levels + 1))
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


def _names() -> list[str]:
    from torchvision.models import list_models

    return list_models(module=detection)


def create_detector(
    detector: str, num_classes: int, image_size: tuple[int, int] = (512, 512), **options: Any
) -> nn.Module:
    """Build a detector.

    Args:
        detector: "yolo" for Mamba-YOLO's neck and head, or a name that `TorchvisionDetector` knows.
        num_classes: Classes without background.
        image_size: Rows and columns of the images that come.
        **options: Of the detector, such as `backbone` and `backbone_args`.

    Raises:
        ValueError: for an unknown detector, or a backbone that does not fit.
        TypeError: for an option that the detector does not have.
    """
    with options_of(f"detector {detector!r}"):
        if detector == "yolo":
            return YoloDetector(options.pop("backbone", None) or "mamba_yolo_tiny", num_classes, **options)
        return TorchvisionDetector(detector, num_classes, image_size, **options)


def as_found(found: Found, factor: Tensor, size: tuple[int, int]) -> Found:
    """Boxes of a fitted image in pixels of the original one, cut at its border.

    Args:
        found: In pixels of the fitted image.
        factor: Pixels (x, y) of the fitted image per pixel of the original.
        size: Rows and columns of the original.
    """
    boxes = found.boxes / factor.repeat(2).to(found.boxes)
    limit = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype, device=boxes.device)
    return found._replace(boxes=boxes.clamp(min=0).minimum(limit))
