"""Blocks of Mamba-YOLO, on maps (batch, channels, i, j).

    LS   a + 1x1(GELU(1x1(BN(dw3x3 a))))                                      local places
    RG   [u | v] = 1x1 x;   1x1(GELU(dw3x3(u) + u) * v)                       residual gate, 8/3 times as wide
    ODSS a = SiLU(BN(1x1 x));   x = a + SS2D(LN(LS a));   x + RG(LN x)

SS2D is that of VMamba with 16 states, twice the width and GELU for both activations.
Source: Wang et al. (2025), Mamba YOLO, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.pyramid import ChannelNorm
from ..models.vmamba import SS2D, scan_four_ways

__all__ = ["LS", "ODSS", "RG", "SPPF", "ConvAct", "Fusion", "GeluSS2D", "Merge"]


class ConvAct(nn.Sequential):
    """Convolution without bias, batch norm, SiLU or GELU."""

    def __init__(
        self, inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1, gelu: bool = False
    ) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outside, eps=1e-3),
            nn.GELU() if gelu else nn.SiLU(),
        )


class GeluSS2D(SS2D):
    """Scans along four orders of maps (b, d, i, j), twice as wide, 16 states, gated by GELU."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, d_state=16, ratio=2.0, gated=True, conv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (b, d, i, j)."""
        dtype = x.dtype
        x, z = self.in_proj(x.permute(0, 2, 3, 1)).chunk(2, dim=-1)
        x = F.gelu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y = scan_four_ways(
            x, self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds, self.d_state
        )
        weight, bias = self.out_norm.weight.to(y.dtype), self.out_norm.bias.to(y.dtype)
        y = F.layer_norm(y, self.out_norm.normalized_shape, weight, bias, self.out_norm.eps) * F.gelu(z)
        return self.out_proj(y.to(dtype)).permute(0, 3, 1, 2)


class LS(nn.Module):
    """Local places: a depthwise convolution and an MLP, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.place = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.fc1, self.fc2 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps to themselves."""
        return x + self.fc2(F.gelu(self.fc1(self.norm(self.place(x)))))


class RG(nn.Module):
    """Residual gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 4 * channels * 2 // 3
        self.fc1 = nn.Conv2d(channels, 2 * hidden, 1)
        self.place = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps to themselves."""
        u, v = self.fc1(x).chunk(2, dim=1)
        return self.fc2(F.gelu(self.place(u) + u) * v)


class ODSS(nn.Module):
    """One block of a stage."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = ConvAct(channels, channels)
        self.local = LS(channels)
        self.norm1, self.mixer = ChannelNorm(channels, eps=1e-6), GeluSS2D(channels)
        self.norm2, self.gate = ChannelNorm(channels, eps=1e-6), RG(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps to themselves."""
        x = self.project(x)
        x = x + self.mixer(self.norm1(self.local(x)))
        return x + self.gate(self.norm2(x))


class Fusion(nn.Module):
    """Where two levels meet: a projection, local places, some scans one after another, a gate."""

    def __init__(self, inside: int, outside: int, repeats: int) -> None:
        super().__init__()
        self.project = ConvAct(inside, outside)
        self.local = LS(outside)
        self.norm1 = ChannelNorm(outside, eps=1e-6)
        self.mixers = nn.Sequential(*(GeluSS2D(outside) for _ in range(repeats)))
        self.norm2, self.gate = ChannelNorm(outside, eps=1e-6), RG(outside)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inside, i, j) to (b, outside, i, j)."""
        x = self.project(x)
        x = x + self.mixers(self.norm1(self.local(x)))
        return x + self.gate(self.norm2(x))


class Merge(nn.Module):
    """Half the sides without loss: four shifted sub-grids as channels, then a projection."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.project = ConvAct(4 * inside, outside)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inside, i, j) to (b, outside, i / 2, j / 2), rounded up."""
        return self.project(F.pixel_unshuffle(F.pad(x, [0, x.shape[3] % 2, 0, x.shape[2] % 2]), 2))


class SPPF(nn.Module):
    """The map beside its maxima over 5, 9 and 13 cells a side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = ConvAct(channels, channels // 2), ConvAct(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps to themselves."""
        parts = [self.reduce(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.expand(torch.cat(parts, dim=1))
