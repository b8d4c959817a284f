"""Mamba-YOLO: backbone, neck and anchor-free head.

    size    widths                depths    neck  parameters (80 classes)
    tiny    32 64 128 256         1 1 3 1      1      6,129,192
    base    64 128 256 512        1 1 3 1      1     21,822,992
    large   96 192 384 576        2 2 6 2      2     57,620,256

Source: Wang et al. (2025), Mamba YOLO. The head predicts, for each cell of three levels, one score per class
and four distances to the sides of a box, each as a distribution over 16 values (Li, Wang, Wu et al. 2020, Generalized
focal loss, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import options_of
from .features import Features
from .yolo_blocks import ODSS, SPPF, ConvAct, Fusion, Merge

BINS = 16
SIZES: dict[str, dict[str, Any]] = {
    "mamba_yolo_tiny": {"widths": (32, 64, 128, 256), "depths": (1, 1, 3, 1), "repeats": 1},
    "mamba_yolo_base": {"widths": (64, 128, 256, 512), "depths": (1, 1, 3, 1), "repeats": 1},
    "mamba_yolo_large": {"widths": (96, 192, 384, 576), "depths": (2, 2, 6, 2), "repeats": 2},
}


class Raw(NamedTuple):
    """What a head says of all cells, A in number.

    Attributes:
        scores: Logits, (b, A, classes).
        distances: Logits of the distributions of left, top, right and bottom, (b, A, 4, 16).
        centres: Of the cells, (x, y) in pixels, (A, 2).
        strides: Of the cells in pixels, (A,).
    """

    scores: Tensor
    distances: Tensor
    centres: Tensor
    strides: Tensor


class YoloBackbone(nn.Module):
    """Maps of strides 8, 16 and 32.

    Args:
        widths: Channels at strides 4, 8, 16 and 32.
        depths: Blocks of each stage.
    """

    strides = (8, 16, 32)

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256), depths: Sequence[int] = (1, 1, 3, 1)) -> None:
        super().__init__()
        if len(widths) != 4 or len(depths) != 4:
            raise ValueError(f"widths and depths need 4 entries, got {list(widths)} and {list(depths)}.")
        first = widths[0] // 2
        self.stem = nn.Sequential(ConvAct(3, first, 3, 2, gelu=True), ConvAct(first, widths[0], 3, 2))
        self.channels = tuple(widths[1:])
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        for k, (width, depth) in enumerate(zip(widths, depths)):
            self.merges.append(Merge(widths[k - 1], width) if k else nn.Identity())
            self.stages.append(nn.Sequential(*(ODSS(width) for _ in range(depth))))
        self.pool = SPPF(widths[-1])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (b, channels, i, j) of images (batch, 3, height, width)."""
        x, levels = self.stem(x), []
        for merge, stage in zip(self.merges, self.stages):
            x = stage(merge(x))
            levels.append(x)
        return [*levels[1:-1], self.pool(levels[-1])]


class YoloNeck(nn.Module):
    """Levels meet from coarse to fine and back.

    Args:
        channels: Of the levels that come in, finest first.
        widths: Of those that go out.
        repeats: Scans of each meeting.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], repeats: int = 1) -> None:
        super().__init__()
        a, b, c = channels
        fine, middle, coarse = widths
        self.down1, self.down2 = Fusion(b + c, middle, repeats), Fusion(a + middle, fine, repeats)
        self.step1, self.step2 = ConvAct(fine, fine, 3, 2), ConvAct(middle, middle, 3, 2)
        self.up1, self.up2 = Fusion(fine + middle, middle, repeats), Fusion(middle + c, coarse, repeats)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Three levels to three levels."""
        a, b, c = levels
        middle = self.down1(torch.cat([_grown(c, b), b], dim=1))
        fine = self.down2(torch.cat([_grown(middle, a), a], dim=1))
        middle = self.up1(torch.cat([self.step1(fine), middle], dim=1))
        return [fine, middle, self.up2(torch.cat([self.step2(middle), c], dim=1))]


def _grown(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")


class YoloHead(nn.Module):
    """Scores and distances of each cell by two branches of convolutions.

    Args:
        channels: Of the levels.
        strides: Their pixels per cell.
        num_classes: Classes.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.strides, self.num_classes = tuple(strides), num_classes
        box, score = max(16, channels[0] // 4, 4 * BINS), max(channels[0], min(num_classes, 100))
        self.boxes = nn.ModuleList(
            nn.Sequential(ConvAct(c, box, 3), ConvAct(box, box, 3), nn.Conv2d(box, 4 * BINS, 1)) for c in channels
        )
        self.scores = nn.ModuleList(
            nn.Sequential(ConvAct(c, score, 3), ConvAct(score, score, 3), nn.Conv2d(score, num_classes, 1))
            for c in channels
        )
        for boxes, scores in zip(self.boxes, self.scores):
            nn.init.ones_(boxes[-1].bias)  # type: ignore[index, arg-type]
            nn.init.constant_(scores[-1].bias, -math.log(99))  # type: ignore[index, arg-type]

    def forward(self, levels: Sequence[Tensor]) -> Raw:
        """All cells of all levels, finest first, each level row by row."""
        scores, distances, centres, strides = [], [], [], []
        for level, stride, boxes, classes in zip(levels, self.strides, self.boxes, self.scores):
            rows, columns = level.shape[-2:]
            scores.append(classes(level).flatten(2).mT)
            distances.append(boxes(level).flatten(2).mT.unflatten(2, (4, BINS)))
            y, x = torch.meshgrid(
                torch.arange(rows, device=level.device), torch.arange(columns, device=level.device), indexing="ij"
            )
            centres.append((torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * stride)
            strides.append(torch.full((rows * columns,), float(stride), device=level.device))
        return Raw(torch.cat(scores, 1), torch.cat(distances, 1), torch.cat(centres), torch.cat(strides))


def decoded(raw: Raw) -> Tensor:
    """Boxes (b, A, 4) as corners in pixels: means of the distributions, in strides from the cell's centre."""
    values = torch.arange(BINS, device=raw.distances.device, dtype=torch.float32)
    means = (raw.distances.float().softmax(-1) * values).sum(-1)  # no matrix product: autocast would round it
    sides = means * raw.strides[:, None]
    return torch.cat([raw.centres - sides[..., :2], raw.centres + sides[..., 2:]], dim=-1)


class Yolo(nn.Module):
    """Backbone, neck and head; maps images in [0, 1] to `Raw`.

    Args:
        backbone: "mamba_yolo_tiny", "mamba_yolo_base" or "mamba_yolo_large", or the name of a pyramid of ours or
            timm's, of which the levels at strides 8, 16 and 32 are taken.
        num_classes: Classes.
        backbone_args: Its options; of Mamba-YOLO `widths` and `depths`.
        widths: Channels of the neck's levels; None takes the backbone's.
        repeats: Scans of each meeting in the neck; None as the size says.

    Raises:
        ValueError: if the backbone has not these strides, or the neck not three levels.
        TypeError: for an option that the backbone does not have.
    """

    def __init__(
        self,
        backbone: str = "mamba_yolo_tiny",
        num_classes: int = 80,
        backbone_args: dict[str, Any] | None = None,
        widths: Sequence[int] | None = None,
        repeats: int | None = None,
    ) -> None:
        super().__init__()
        options = dict(backbone_args or {})
        if backbone in SIZES:
            size = {**SIZES[backbone], **options}
            repeats = size.pop("repeats") if repeats is None else repeats
            with options_of(f"backbone {backbone!r}"):
                self.backbone: nn.Module = YoloBackbone(**{k: size[k] for k in size if k != "repeats"})
            self.default_cfg: Any = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
            channels = self.backbone.channels
        else:
            features = Features(backbone, options, least_stride=YoloBackbone.strides[0])
            if tuple(features.strides) != YoloBackbone.strides:
                raise ValueError(f"{backbone!r} has strides {features.strides}, a detector needs 8, 16 and 32.")
            self.backbone, self.default_cfg, channels = features, features.default_cfg, tuple(features.channels)
        widths = tuple(widths or channels)
        if len(widths) != 3 or min(widths) < 2 or (repeats is not None and repeats < 1):
            raise ValueError(f"a neck has 3 widths from 2 on and repeats from 1 on, got {list(widths)} and {repeats}.")
        self.num_classes = num_classes
        self.neck = YoloNeck(channels, widths, repeats or 1)
        self.head = YoloHead(widths, YoloBackbone.strides, num_classes)

    def forward(self, x: Tensor) -> Raw:
        """Scores and distances of all cells; sides below a multiple of 32 are filled up."""
        x = F.pad(x, [0, -x.shape[3] % 32, 0, -x.shape[2] % 32])
        return self.head(self.neck(self.backbone(x)))
