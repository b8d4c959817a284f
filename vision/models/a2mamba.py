"""A2Mamba: a pyramid whose attention in two windows also gathers the states of a selective scan.

    q, k, v  = heads of conv 1 x 1 (x), q and k turned by rotary positions
    first half of the heads    a1 = attention in windows of K x K,          y1 = a1 v1
    second half                a2 = attention in windows of distance D,     y2 = a2 (y1 + v2)
    A2SSM    u = silu(depthwise 5 x 5 [y1, y2]);  s_t = exp(dt_t A) s_{t-1} + dt_t B_t u_t, row by row
             h = heads mixed of [a1 s1, a2 s2];   y = C h + D u
    out      conv 1 x 1 (LN((LN(y) + depthwise 5 x 5 (v)) * silu(BatchNorm(conv 1 x 1 (x)))))

D is the largest distance for which a window fits, up to K. The last stage takes attention over all cells, of the same
queries and keys with [y1, y2] as values and a learned table of pairs of cells, instead of A2SSM.
Source: Lou, Fu & Yu (2025), A2Mamba, section 3.

    name            channels         depths    heads       MLP              parameters
    a2mamba_nano    32 64 128 192    2 2 8 2   2 2 4 8     4 4 3 3           4,195,052
    a2mamba_tiny    48 96 256 448    2 2 10 2  2 4 8 16    4 4 3 3          15,365,506
    a2mamba_small   64 128 320 512   2 4 12 4  2 4 10 16   4 4 3 3          30,672,834
    a2mamba_base    96 192 384 512   4 6 12 6  4 8 12 16   4 4 3.75 3.75    51,134,464
    a2mamba_large   96 192 448 672   4 6 18 6  4 8 16 24   4 4 4 4          93,737,376
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
from ..neighborhood import neighborhood_average
from ..scans import at_least_float32, raw_steps, selective_mix
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


class AugmentedScan(nn.Module):
    """A2SSM: a selective scan by rows, one state per channel, whose states are gathered by given attention weights.

    Args:
        dim: Channels.
        num_heads: Heads, an even divisor of them.
        window: Side of the windows.
        dt_min: Shortest initial step.
        dt_max: Longest one.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        *,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": at_least_float32(dtype)}
        self.window = window
        rank = math.ceil(dim / 16)
        self.conv2d = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **factory)
        maps, steps = torch.empty(rank + 2, dim, **factory), torch.empty(dim, rank, **factory)
        self.x_proj_weight = nn.Parameter(nn.init.uniform_(maps, -(dim**-0.5), dim**-0.5))
        self.dt_projs_weight = nn.Parameter(nn.init.uniform_(steps, -(rank**-0.5), rank**-0.5))
        self.dt_projs_bias = nn.Parameter(dt_bias_init(dim, dt_min, dt_max, **wide))
        self.A_logs = nn.Parameter(a_log_init(dim, 1, **wide))
        self.Ds = nn.Parameter(torch.ones(dim, **wide))
        self.state_fusion = nn.Conv2d(num_heads, num_heads, 1, **factory)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("A_logs", "Ds", "dt_projs_bias")

    def forward(self, x: Tensor, near: Tensor, far: Tensor) -> Tensor:
        """Mix maps (b, dim, i, j) with the weights of the near and far windows, (b, h/2, i, j, ., .)."""
        x = F.silu(self.conv2d(x))
        low = F.linear(x.permute(0, 2, 3, 1), self.x_proj_weight)
        return augmented_scan(
            x,
            low,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
            self.state_fusion.weight,
            self.state_fusion.bias,
            near,
            far,
            self.window,
        )


@register_notrace_function
@torch.jit.ignore
def augmented_scan(
    x: Tensor,
    low: Tensor,
    steps: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    mixing: Tensor,
    mixing_bias: Tensor | None,
    near: Tensor,
    far: Tensor,
    window: int,
) -> Tensor:
    """Scan by rows, gather the states, read out.

    Args:
        x: Maps, (b, d, i, j).
        low: dt of low rank, B and C of each cell, (b, i, j, r + 2).
        steps: (d, r).
        dt_bias: (d,).
        A_log: Logarithm of the decay rates, (d, 1).
        D: Skip, (d,).
        mixing: Map between heads, (h, h, 1, 1).
        mixing_bias: (h,), or None.
        near: Weights of the first half of the heads, (b, h/2, i, j, rows' window, columns' window).
        far: Those of the second half, in windows of largest distance.
        window: Side of the windows.

    Returns:
        (b, d, i, j) in float32, float64 for float64 inputs.
    """
    cells = x.permute(0, 2, 3, 1)
    dt, B, C = low.flatten(1, 2).split([low.shape[-1] - 2, 1, 1], dim=-1)
    dt = raw_steps(dt, steps, dt_bias)
    states = selective_mix(cells.flatten(1, 2), dt, None, A_log, B, torch.ones_like(B), torch.zeros_like(D), 0)
    with torch.autocast(x.device.type, enabled=False):
        states = states.unflatten(1, x.shape[2:]).unflatten(-1, (mixing.shape[0], -1)).movedim(3, 1)
        first, second = states.chunk(2, dim=1)
        gathered = [neighborhood_average(near, first, window, 1), neighborhood_average(far, second, window, window)]
        states = torch.einsum("gh,bhijc->bgcij", mixing.to(states.dtype).flatten(1), torch.cat(gathered, dim=1))
        if mixing_bias is not None:
            states = states + mixing_bias.to(states.dtype)[:, None, None, None]
        read = C.to(states.dtype).unflatten(1, x.shape[2:]).movedim(-1, 1)
        return states.flatten(1, 2) * read + x.to(states.dtype) * D.to(states.dtype)[:, None, None]


class A2Attention(AttentiveMixer):
    """Attention in two windows, then the scan or attention over all cells, and a gate; maps (b, dim, i, j).

    Args:
        dim: Channels.
        num_heads: Heads, an even divisor of them, each of a multiple of 4 channels.
        window: Side of the windows, odd.
        grid: For attention over all cells: rows and columns of the grid that its table is made for.
        table_as_image: See `AttentivePyramid`.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if the heads do not fit.
    """

    paired = True

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
        self.gate = nn.Sequential(nn.Conv2d(dim, dim, 1, **factory), nn.BatchNorm2d(dim, **factory), nn.SiLU())
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **factory)
        self.norm = ChannelNorm(dim, eps=1e-6, **factory)
        self.proj = nn.Sequential(ChannelNorm(dim, eps=1e-6, **factory), nn.Conv2d(dim, dim, 1, **factory))
        if grid is None:
            self.ssm = AugmentedScan(dim, num_heads, window, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (b, dim, i, j)."""
        gate = self.gate(x)
        qkv = self.qkv(x)
        local = self.lepe(qkv[:, -self.dim :])
        q, k, v = rotated_heads(qkv, self.num_heads)
        y, near, far = two_windows(q, k, v, self.bias_table, self.window)
        if self.is_global:
            values = y.unflatten(1, [self.num_heads, -1]).permute(0, 1, 3, 4, 2)
            y = global_attention(q, k, values, self.global_table, self.grid, self.table_as_image)
        else:
            y = self.ssm(y, near, far)
        norm, conv = self.proj[0], self.proj[1]
        y = normed(y, self.norm.weight, self.norm.bias) + local
        return gated_projection(y, gate, norm.weight, norm.bias, conv.weight, conv.bias).to(x.dtype)


@register_notrace_function
@torch.jit.ignore
def two_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (b, d, i, j) of both halves of the heads, and their weights."""
    q1, q2 = q.chunk(2, dim=1)
    k1, k2 = k.chunk(2, dim=1)
    v1, v2 = v.chunk(2, dim=1)
    near, first = window_attention(q1, k1, v1, bias, window, 1)
    far, second = window_attention(q2, k2, first + v2, bias, window, window)
    y = torch.cat([first, second], dim=1).permute(0, 1, 4, 2, 3).flatten(1, 2)
    return y, near, far


@register_notrace_function
@torch.jit.ignore
def gated_projection(
    x: Tensor, gate: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """conv 1 x 1 (LN(x * gate)) of maps in at least float32: their products grow large in training."""
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        x = normed(x.to(wide) * gate.to(wide), norm_weight, norm_bias)
        return F.conv2d(x, weight.to(wide), None if bias is None else bias.to(wide))


class A2Mamba(AttentivePyramid):
    """A2Mamba; options as of `AttentivePyramid`."""

    mixer = A2Attention


def checkpoint_filter_fn(state_dict: dict[str, Any], model: A2Mamba) -> dict[str, Tensor]:
    """Weights under our names, from ours or the published ones (`layers.i.blocks.k.token_mixer.*`).

    There, both halves of the heads share one bias table, which stands in the file twice.
    """
    return published_names(state_dict, model, "rpb.2", r"\.rpb\.1$")


_create = partial(create_pyramid, A2Mamba, checkpoint_filter_fn)


default_cfgs = generate_default_cfgs(
    {
        f"a2mamba_{size}.untrained": pyramid_cfg("arXiv:2507.16624", "stem.0", "head.fc", crop_pct=crop)
        for size, crop in {"nano": 0.9, "tiny": 0.9, "small": 0.9, "base": 0.95, "large": 0.975}.items()
    }
)


@register_model
def a2mamba_nano(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """32 to 192 channels, depths 2 2 8 2."""
    return _create("a2mamba_nano", pretrained, **kwargs)


@register_model
def a2mamba_tiny(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """48 to 448 channels, depths 2 2 10 2."""
    size = {"dims": (48, 96, 256, 448), "depths": (2, 2, 10, 2), "num_heads": (2, 4, 8, 16)}
    return _create("a2mamba_tiny", pretrained, **{**size, **kwargs})


@register_model
def a2mamba_small(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """64 to 512 channels, depths 2 4 12 4, factors on the stream of the last two stages."""
    size: dict[str, Any] = {"dims": (64, 128, 320, 512), "depths": (2, 4, 12, 4), "num_heads": (2, 4, 10, 16)}
    scale = {"layer_scale": (None, None, 1.0, 1.0), "scale_stream": (False, False, True, True)}
    return _create("a2mamba_small", pretrained, **{**size, **scale, **kwargs})


_SCALE: dict[str, Any] = {"layer_scale": (1.0, 1.0, 1e-6, 1e-6)}


@register_model
def a2mamba_base(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """96 to 512 channels, depths 4 6 12 6, layer scale."""
    size: dict[str, Any] = {"dims": (96, 192, 384, 512), "depths": (4, 6, 12, 6), "num_heads": (4, 8, 12, 16)}
    return _create("a2mamba_base", pretrained, **{**size, **_SCALE, "mlp_ratios": (4, 4, 3.75, 3.75), **kwargs})


@register_model
def a2mamba_large(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """96 to 672 channels, depths 4 6 18 6, layer scale."""
    size: dict[str, Any] = {"dims": (96, 192, 448, 672), "depths": (4, 6, 18, 6), "num_heads": (4, 8, 16, 24)}
    return _create("a2mamba_large", pretrained, **{**size, **_SCALE, "mlp_ratios": (4, 4, 4, 4), **kwargs})
