"""SegMAN's encoder: a pyramid whose windows of attention feed scans along four orders of the cells.

    q, k, v = heads of conv 1 x 1 (x), q and k turned by rotary positions;  a = attention in windows of K x K
    y = LN(S(silu(BatchNorm(depthwise 3 x 3 (a))))) + a          S: selective scans by rows, columns, both backwards
    out = conv 1 x 1 (y + depthwise 5 x 5 (v))

The last stage takes attention over all cells, of the same queries and keys with a as values and a learned table of
pairs of cells, instead of the scans. Its decoder is `omnissm.vision.dense.heads.SegMANDecoder`.
Source: Fu, Lou & Yu (2025), SegMAN, section 3.2.

    name       channels         depths    heads      windows   MLP           parameters
    segman_t   32 64 144 192    2 2 4 2   1 2 4 8    11 9 9 7  4 4 3 3        3,506,014
    segman_s   64 144 288 512   2 2 10 4  2 4 8 16   11 9 7 7  4 4 3.4 3.4   25,507,582
    segman_b   96 160 364 560   4 4 18 4  4 8 13 20  11 9 7 7  4 4 3 3       45,020,682
    segman_l   96 192 432 640   4 4 28 4  4 8 12 20  11 9 7 7  4 4 3 3       80,985,272
"""

# No postponed annotations here: TorchScript reads those of the functions that it leaves alone.

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn

from ...ssmcore.init import a_log_init, dt_bias_init
from ..scans import at_least_float32
from .attentive import (
    AttentiveMixer,
    AttentivePyramid,
    global_attention,
    normed,
    published_names,
    rotated_heads,
    window_attention,
)
from .pyramid import ChannelNorm
from .settings import create_pyramid, pyramid_cfg
from .vmamba import scan_four_ways


class FourScans(nn.Module):
    """Selective scans of maps along four orders of the cells, one state per channel, without projections around them.

    Args:
        dim: Channels.
        dt_min: Shortest initial step.
        dt_max: Longest one.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        dim: int,
        *,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": at_least_float32(dtype)}
        rank = math.ceil(dim / 16)
        maps, steps = torch.empty(4, rank + 2, dim, **factory), torch.empty(4, dim, rank, **factory)
        self.x_proj_weight = nn.Parameter(nn.init.uniform_(maps, -(dim**-0.5), dim**-0.5))
        self.dt_projs_weight = nn.Parameter(nn.init.uniform_(steps, -(rank**-0.5), rank**-0.5))
        self.dt_projs_bias = nn.Parameter(dt_bias_init((4, dim), dt_min, dt_max, **wide))
        self.A_logs = nn.Parameter(a_log_init(4 * dim, 1, **wide))
        self.Ds = nn.Parameter(torch.ones(4 * dim, **wide))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("A_logs", "Ds", "dt_projs_bias")

    def forward(self, x: Tensor) -> Tensor:
        """Mix maps (b, dim, i, j), in float32 at least."""
        cells = x.permute(0, 2, 3, 1)
        y = scan_four_ways(cells, self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds, 1)
        return y.permute(0, 3, 1, 2)


class SegMANAttention(AttentiveMixer):
    """Attention in windows, then four scans or attention over all cells; maps (b, dim, i, j).

    Args:
        dim: Channels.
        num_heads: Heads, each of a multiple of 4 channels.
        window: Side of the windows, odd.
        grid: For attention over all cells: rows and columns of the grid that its table is made for.
        table_as_image: How that table follows another size; see `AttentivePyramid`.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if the heads do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        grid: tuple[int, int] | None = None,
        table_as_image: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, window, grid, table_as_image, device, dtype)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **factory)
        self.proj = nn.Conv2d(dim, dim, 1, **factory)
        if grid is None:
            conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
            self.dwconv = nn.Sequential(conv, nn.BatchNorm2d(dim, **factory))
            self.ssm = FourScans(dim, **factory)
            self.norm = ChannelNorm(dim, eps=1e-6, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (b, dim, i, j)."""
        qkv = self.qkv(x)
        local = self.lepe(qkv[:, -self.dim :])
        q, k, v = rotated_heads(qkv, self.num_heads)
        seen = window_average(q, k, v, self.bias_table, self.window)
        if self.is_global:
            y = global_attention(q, k, seen, self.global_table, self.grid, self.table_as_image)
        else:
            maps = seen.permute(0, 1, 4, 2, 3).flatten(1, 2)
            scanned = self.ssm(F.silu(self.dwconv(maps)))
            y = normed(scanned, self.norm.weight, self.norm.bias).to(maps.dtype) + maps
        return self.proj((y + local).to(x.dtype))


@register_notrace_function
@torch.jit.ignore
def window_average(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int) -> Tensor:
    """Attention in windows of neighbours: (b, h, i, j, c) three times to the same."""
    return window_attention(q, k, v, bias, window, 1)[1]


class SegMAN(AttentivePyramid):
    """SegMAN's encoder; options as of `AttentivePyramid`."""

    mixer = SegMANAttention


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SegMAN) -> dict[str, Tensor]:
    """Weights under our names, from ours or the published ones (`layers.i.blocks.k.token_mixer.*`)."""
    return published_names(state_dict, model, "rpb.1", r"^$")


_create = partial(create_pyramid, SegMAN, checkpoint_filter_fn)


default_cfgs = generate_default_cfgs(
    {
        f"segman_{size}.untrained": pyramid_cfg("arXiv:2412.11890", "stem.0", "head.fc", crop_pct=crop)
        for size, crop in {"t": 0.9, "s": 0.9, "b": 0.95, "l": 0.95}.items()
    }
)


@register_model
def segman_t(pretrained: bool = False, **kwargs: Any) -> SegMAN:
    """32 to 192 channels, depths 2 2 4 2."""
    size = {"dims": (32, 64, 144, 192), "depths": (2, 2, 4, 2), "num_heads": (1, 2, 4, 8)}
    return _create("segman_t", pretrained, **{**size, "window_size": (11, 9, 9, 7), **kwargs})


@register_model
def segman_s(pretrained: bool = False, **kwargs: Any) -> SegMAN:
    """64 to 512 channels, depths 2 2 10 4."""
    size: dict[str, Any] = {"dims": (64, 144, 288, 512), "depths": (2, 2, 10, 4), "num_heads": (2, 4, 8, 16)}
    return _create("segman_s", pretrained, **{**size, "mlp_ratios": (4, 4, 3.4, 3.4), **kwargs})


@register_model
def segman_b(pretrained: bool = False, **kwargs: Any) -> SegMAN:
    """96 to 560 channels, depths 4 4 18 4, layer scale."""
    size: dict[str, Any] = {"dims": (96, 160, 364, 560), "depths": (4, 4, 18, 4), "num_heads": (4, 8, 13, 20)}
    return _create("segman_b", pretrained, **{**size, "layer_scale": (1e-6,) * 4, **kwargs})


@register_model
def segman_l(pretrained: bool = False, **kwargs: Any) -> SegMAN:
    """96 to 640 channels, depths 4 4 28 4, layer scale."""
    size: dict[str, Any] = {"dims": (96, 192, 432, 640), "depths": (4, 4, 28, 4), "num_heads": (4, 8, 12, 20)}
    return _create("segman_l", pretrained, **{**size, "layer_scale": (1e-6,) * 4, **kwargs})
