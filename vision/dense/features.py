"""Maps of several strides out of any backbone of timm: pyramids as they are, token models through a simple pyramid.

Source of the latter: Li, Mao, Girshick, He (2022), Exploring plain vision transformer backbones, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.pyramid import ChannelNorm
from ..registry import create_model


class Features(nn.Module):
    """Normed maps of a backbone, finest first.

    Args:
        backbone: Name of a model of ours or timm's that knows `features_only`.
        backbone_args: Its options; `out_indices` chooses the stages.
        norm: LayerNorm over the channels of each level.
        least_stride: Finer levels are left out.

    Attributes:
        channels: Of each level.
        strides: Pixels per cell of each level.

    Raises:
        ValueError: if the model is unknown or has neither several strides nor tokens.
    """

    def __init__(
        self, backbone: str, backbone_args: dict[str, Any] | None = None, norm: bool = True, least_stride: int = 1
    ) -> None:
        super().__init__()
        self.body = create_model(backbone, features_only=True, **(backbone_args or {}))
        info: Any = self.body.feature_info
        self.channels, self.strides = list(info.channels()), list(info.reduction())
        self.default_cfg = self.body.default_cfg
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).rpartition(".")[2] == "NHWC"
        self.simple: SimplePyramid | None = None
        if len(set(self.strides)) == 1:
            self.simple = SimplePyramid(self.channels[-1])
            self.channels = [self.channels[-1]] * 4
            self.strides = [max(1, self.strides[-1] // 4), max(1, self.strides[-1] // 2), self.strides[-1]]
            self.strides.append(2 * self.strides[-1])
        elif sorted(set(self.strides)) != self.strides:
            raise ValueError(f"{backbone!r} has maps of strides {self.strides}, expected them to grow.")
        self.first = sum(stride < least_stride for stride in self.strides)
        self.channels, self.strides = self.channels[self.first :], self.strides[self.first :]
        self.norms = nn.ModuleList(ChannelNorm(c, eps=1e-6) if norm else nn.Identity() for c in self.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (b, channels, i, j) of images (batch, channels, height, width); images below 32 pixels are filled up."""
        short = [max(0, 32 - side) for side in (x.shape[3], x.shape[2])]
        if any(short):
            x = F.pad(x, [0, short[0], 0, short[1]])
        maps: Sequence[Tensor] = self.body(x)
        if self.channels_last:
            maps = [level.permute(0, 3, 1, 2) for level in maps]
        if self.simple is not None:
            maps = self.simple(maps[-1])
        return [norm(level) for norm, level in zip(self.norms, maps[self.first :])]


class SimplePyramid(nn.Module):
    """Four levels out of one map: four and two times its sides, as it is, and half of them.

    Args:
        channels: Of the map and of all levels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, 2),
            ChannelNorm(channels, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 2, 2),
        )
        self.up2 = nn.ConvTranspose2d(channels, channels, 2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, channels, i, j) to levels of 4, 2, 1 and 1/2 times its sides."""
        return [self.up4(x), self.up2(x), x, F.max_pool2d(x, 2, ceil_mode=True)]


def conv_norm(inside: int, outside: int, kernel: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution without bias, batch norm, and ReLU if asked."""
    parts: list[nn.Module] = [
        nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outside),
    ]
    return nn.Sequential(*parts, nn.ReLU()) if act else nn.Sequential(*parts)


def resized(x: Tensor, like: Tensor | Sequence[int]) -> Tensor:
    """Bilinear copy with the sides of another map, or (rows, columns); half-pixel centres."""
    size = list(like.shape[-2:]) if isinstance(like, torch.Tensor) else list(like)
    return x if list(x.shape[-2:]) == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
