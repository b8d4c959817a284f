"""Heads of semantic segmentation on the levels of a pyramid.

FPN      Kirillov, Girshick, He, Dollár (2019), Panoptic feature pyramid networks, section 3.1
UPerNet  Xiao, Liu, Zhou, Jiang, Sun (2018), Unified perceptual parsing, section 3
SegMAN   Fu, Lou, Yu (2025), SegMAN, section 3.3
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from ..layers import init_linear_
from ..models.token_model import Mlp
from ..models.vmamba import SS2D
from ..registry import options_of
from .features import conv_norm, resized


class FPNHead(nn.Module):
    """A feature pyramid whose levels are smoothed, brought to the finest one and added.

    Args:
        channels: Of the levels, finest first.
        num_classes: Width of the logits.
        width: Channels inside.
        dropout: Before the classifier.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, width: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(list(channels), width)
        self.smooth = nn.ModuleList(conv_norm(width, width, 3) for _ in channels)
        self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits (b, num_classes, i, j) with the sides of the finest level."""
        merged = list(self.pyramid({str(k): level for k, level in enumerate(levels)}).values())
        total = self.smooth[0](merged[0])
        for smooth, level in zip(list(self.smooth)[1:], merged[1:]):
            total = total + resized(smooth(level), total)
        return self.classify(total)


class UPerNet(nn.Module):
    """Means over 1, 2, 3 and 6 cells a side of the coarsest level, a feature pyramid, and all levels side by side.

    Args:
        channels: Of the levels, finest first.
        num_classes: Width of the logits.
        width: Channels inside.
        pools: Cells a side of the means.
        dropout: Before the classifier.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 512,
        pools: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.pools = tuple(pools)
        self.means = nn.ModuleList(conv_norm(channels[-1], width) for _ in pools)
        self.bottleneck = conv_norm(channels[-1] + len(self.pools) * width, width, 3)
        self.lateral = nn.ModuleList(conv_norm(c, width) for c in channels[:-1])
        self.smooth = nn.ModuleList(conv_norm(width, width, 3) for _ in channels[:-1])
        self.fuse = conv_norm(len(channels) * width, width, 3)
        self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits (b, num_classes, i, j) with the sides of the finest level.

        Raises:
            ValueError: in training on a batch of one image, of which batch norm knows no deviation.
        """
        top = levels[-1]
        if self.training and len(top) < 2:
            raise ValueError("UPerNet trains on batches of at least 2 images, got 1; choose the head 'fpn'.")
        context = [resized(mean(F.adaptive_avg_pool2d(top, n)), top) for n, mean in zip(self.pools, self.means)]
        merged = [lateral(level) for lateral, level in zip(self.lateral, levels)]
        merged.append(self.bottleneck(torch.cat([top, *context], dim=1)))
        for k in range(len(merged) - 2, -1, -1):
            merged[k] = merged[k] + resized(merged[k + 1], merged[k])
        merged = [smooth(level) for smooth, level in zip(self.smooth, merged)] + merged[-1:]
        return self.classify(self.fuse(torch.cat([resized(level, merged[0]) for level in merged], dim=1)))


class SegMANDecoder(nn.Module):
    """One scan over three resolutions at once: the coarser ones keep all cells, as channels.

        x     = relu(bn(1x1 [c2 | c3 | c4]))                           each first to width f and stride 8
        r     = [unshuffle4(x) | unshuffle2(conv3x3/2 x) | conv5x5/4 x], each 1x1 to e, at stride 32
        r     = r + dw3x3 r;  r + SS2D(LN r);  r + dw3x3 r;  r + MLP(LN r);  then up to stride 8
        y     = classify(1x1 [1x1 x | mean x | r | c2 + p | c3 + p | c4 + p]),  p = 1x1 r

    Args:
        channels: Of the levels, finest first; the last three are used.
        num_classes: Width of the logits.
        width: e.
        level_width: f.
        dropout: Before the classifier.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 128,
        level_width: int = 192,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(channels) < 3:
            raise ValueError(f"SegMAN's decoder needs three levels, got {len(channels)}.")
        e, f = width, level_width
        self.levels = nn.ModuleList(nn.Conv2d(c, f, 1) for c in channels[-3:])
        self.fuse = conv_norm(3 * f, e)
        self.halve = nn.Conv2d(e, 2 * e, 3, 2, 1)
        self.quarter = nn.Conv2d(e, 4 * e, 5, 4, 1)
        self.reduce = nn.ModuleList(nn.Conv2d(c, e, 1) for c in (16 * e, 8 * e, 4 * e))
        self.place1 = nn.Conv2d(3 * e, 3 * e, 3, padding=1, groups=3 * e)
        self.norm1, self.mixer = nn.LayerNorm(3 * e), SS2D(3 * e, d_state=1, ratio=1.0)
        self.place2 = nn.Conv2d(3 * e, 3 * e, 3, padding=1, groups=3 * e)
        self.norm2, self.mlp = nn.LayerNorm(3 * e), Mlp(3 * e, 12 * e)
        self.own, self.mean, self.spread = nn.Conv2d(e, e, 1), nn.Conv2d(e, e, 1), nn.Conv2d(3 * e, f, 1)
        self.classify = nn.Sequential(
            nn.Conv2d(5 * e + 3 * f, e, 1), nn.Dropout2d(dropout), nn.Conv2d(e, num_classes, 1)
        )
        init_linear_(self)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits (b, num_classes, i, j) at stride 8."""
        own = [conv(level) for conv, level in zip(self.levels, levels[-3:])]
        own = [resized(level, own[0]) for level in own]
        x = self.fuse(torch.cat(own, dim=1))
        rows, columns = x.shape[-2:]
        whole = F.pad(x, [0, -columns % 4, 0, -rows % 4])
        parts = [F.pixel_unshuffle(whole, 4), F.pixel_unshuffle(self.halve(whole), 2), self.quarter(whole)]
        r = torch.cat([reduce(part) for reduce, part in zip(self.reduce, parts)], dim=1)
        r = (r + self.place1(r)).permute(0, 2, 3, 1)
        r = (r + self.mixer(self.norm1(r))).permute(0, 3, 1, 2)
        r = (r + self.place2(r)).permute(0, 2, 3, 1)
        r = (r + self.mlp(self.norm2(r))).permute(0, 3, 1, 2)
        r = resized(r, whole)[..., :rows, :columns]
        p = self.spread(r)
        mean = self.mean(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, rows, columns)
        return self.classify(torch.cat([self.own(x), mean, r, *(level + p for level in own)], dim=1))


class FCNHead(nn.Module):
    """One convolution and a classifier, on one level; its loss trains the backbone's middle directly."""

    def __init__(self, channels: int, num_classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(conv_norm(channels, width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))

    def forward(self, level: Tensor) -> Tensor:
        """Logits with the sides of the level."""
        return self.net(level)


HEADS: dict[str, type[nn.Module]] = {"fpn": FPNHead, "upernet": UPerNet, "segman": SegMANDecoder}


def create_head(name: str, channels: Sequence[int], num_classes: int, **options: object) -> nn.Module:
    """Build a head by name.

    Args:
        name: "fpn", "upernet" or "segman".
        channels: Of the levels, finest first.
        num_classes: Width of the logits.
        **options: Of the head.

    Raises:
        ValueError: for an unknown head or an option out of range.
        TypeError: for an option that the head does not have.
    """
    if name not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {name!r}.")
    for option in ("width", "level_width"):
        if isinstance(value := options.get(option), int) and value < 1:
            raise ValueError(f"{option} of the head {name!r} must be at least 1, got {value}.")
    with options_of(f"head {name!r}"):
        return HEADS[name](channels, num_classes, **options)
