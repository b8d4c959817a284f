"""MambaVision: convolutions at high resolution, then windows mixed by selective scans and by attention.

    stem         conv 3 x 3 / 2 -> s, BatchNorm, ReLU, conv 3 x 3 / 2 -> C, BatchNorm, ReLU
    stages 0, 1  x + drop_path(BatchNorm(conv(gelu(BatchNorm(conv(x))))))
    stages 2, 3  windows w x w, row by row; x + drop_path(mixer(LN x)); x + drop_path(MLP(LN x)); the first half of the
                 blocks mixes by scans, the second by attention
    between stages: conv 3 x 3 / 2 -> 2C                              head: BatchNorm, mean, linear

    scan mixer   [x | z] = in_proj(u), each a centred depthwise convolution of 3 and silu;
                 out_proj([selective_scan(x), z]), forward only

Source: Hatamizadeh & Kautz (2025), MambaVision, section 3.

    name                C    stem  depths    heads      windows    parameters
    mambavision_tiny    80     32  1 3 8 4   2 4 8 16   8 8 14 7   31,794,248
    mambavision_tiny2   80     32  1 3 11 4  2 4 8 16   8 8 14 7   35,104,008
    mambavision_small   96     64  3 3 7 5   2 4 8 16   8 8 14 7   50,140,584
    mambavision_base    128    64  3 3 10 5  2 4 8 16   8 8 14 7   97,685,288
    mambavision_large   196    64  3 3 10 5  4 8 16 32  8 8 14 7  227,961,048
    mambavision_large2  196    64  3 3 12 5  4 8 16 32  8 8 14 7  241,554,824
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn

from ...ssmcore.init import a_log_init, dt_bias_init
from ..layers import drop_path_rates, init_linear_, pad_grid
from ..scans import at_least_float32, selective_mix, short_conv
from .pyramid import Head, Pyramid, Stage, check_per_stage
from .settings import create_pyramid, pyramid_cfg
from .token_model import Block, Mlp, unwrapped


class HalfScan(nn.Module):
    """Half of the channels through a selective scan, the other half beside it; (b, l, d_model).

    Args:
        d_model: Width of the stream, even.
        d_state: States per channel.
        d_conv: Width of the two centred convolutions.
        dt_min: Shortest initial step.
        dt_max: Longest one.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    own_init = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 8,
        d_conv: int = 3,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": at_least_float32(dtype)}
        half = d_model // 2
        self.d_state, self.dt_rank = d_state, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * half, bias=False, **factory)
        self.x_proj = nn.Linear(half, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, half, **factory)
        self.A_log = nn.Parameter(a_log_init(half, d_state, **wide))
        self.D = nn.Parameter(torch.ones(half, **wide))
        self.conv1d_x = nn.Conv1d(half, half, d_conv, groups=half, padding="same", bias=False, **factory)
        self.conv1d_z = nn.Conv1d(half, half, d_conv, groups=half, padding="same", bias=False, **factory)
        self.out_proj = nn.Linear(2 * half, d_model, bias=False, **factory)
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt_bias_init(half, dt_min, dt_max, **factory))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("A_log", "D", "dt_proj.bias")

    def forward(self, x: Tensor) -> Tensor:
        """Mix (b, l, d_model)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = short_conv(u, self.conv1d_x.weight, None, True)
        z = short_conv(z, self.conv1d_z.weight, None, True)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        y = selective_mix(u, dt, self.dt_proj.bias, self.A_log, B, C, self.D, 0)
        return self.out_proj(torch.cat([y.to(z.dtype), z], dim=-1).to(x.dtype))


class Attention(nn.Module):
    """Softmax attention over the positions of (b, l, dim).

    Args:
        dim: Width of the stream.
        num_heads: Heads, a divisor of it.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the width {dim}, got {num_heads}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (b, l, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, [3, self.num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A learned factor per channel of (..., dim), at first `value`; of (batch, dim, i, j) with `maps`."""

    def __init__(self, dim: int, value: float, maps: bool = False, **factory: Any) -> None:
        super().__init__()
        shape = (dim, 1, 1) if maps else (dim,)
        self.gamma = nn.Parameter(torch.full(shape, value, **factory))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("gamma",)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel."""
        return x * self.gamma


class ConvBlock(nn.Module):
    """x + drop_path(BatchNorm(conv(gelu(BatchNorm(conv(x))))))."""

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale: float | None = None, **factory: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, 1, 1, **factory)
        self.norm1 = nn.BatchNorm2d(dim, **factory)
        self.act = nn.GELU("tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, **factory)
        self.norm2 = nn.BatchNorm2d(dim, **factory)
        self.scale = LayerScale(dim, layer_scale, maps=True, **factory) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Pass maps (batch, dim, i, j)."""
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return x + self.drop_path(self.scale(y))


@register_notrace_function
def into_windows(x: Tensor, size: int) -> Tensor:
    """Windows of a grid (b, i, j, d) as sequences by rows, (b * windows, size^2, d); both sides are multiples."""
    x = x.unflatten(1, [-1, size]).unflatten(3, [-1, size])
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


@register_notrace_function
def out_of_windows(x: Tensor, padded: Tensor, maps: Tensor, size: int) -> Tensor:
    """Undo `into_windows`, with the shape of the padded grid, and crop to that of the maps (b, d, i, j)."""
    rows, columns = padded.shape[1] // size, padded.shape[2] // size
    x = x.unflatten(1, [size, size]).unflatten(0, [-1, rows, columns]).transpose(2, 3)
    x = x.flatten(3, 4).flatten(1, 2)
    return x[:, : maps.shape[2], : maps.shape[3]].permute(0, 3, 1, 2)


class WindowStage(Stage):
    """A stage whose blocks work on the tokens of windows; maps are padded with zeros below and on the right.

    Args:
        downsample: Module, or None.
        blocks: Modules on (b, l, d).
        window_size: Side of a window.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module], window_size: int) -> None:
        super().__init__(downsample, blocks)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the stage's own size."""
        maps = self.downsample(x)
        grid = pad_grid(maps.permute(0, 2, 3, 1), self.window_size)
        windows = self.mix(into_windows(grid, self.window_size))
        return out_of_windows(windows, grid, maps, self.window_size)


class Stem(nn.Module):
    """Two strided convolutions with BatchNorm and ReLU."""

    def __init__(self, in_chans: int, stem_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, stem_dim, 3, 2, 1, bias=False, **factory)
        self.norm1 = nn.BatchNorm2d(stem_dim, eps=1e-4, **factory)
        self.conv2 = nn.Conv2d(stem_dim, dim, 3, 2, 1, bias=False, **factory)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-4, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Images to maps at stride 4."""
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class MambaVision(Pyramid):
    """MambaVision.

    Args:
        in_chans: Channels of an image.
        num_classes: Width of the logits; 0 leaves the pooled features.
        global_pool: "avg" or "" (none).
        dim: Channels of the first stage; each further one has twice as many.
        stem_dim: Channels inside the stem.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage; those of the first two are not used.
        window_size: Side of the windows of each stage; those of the first two are not used.
        mlp_ratio: Inner width of the MLPs over the channels.
        d_state: States per channel of the scans.
        layer_scale: First value of learned factors of the branches in stages 2 and 3; None for none.
        layer_scale_conv: The same for stages 0 and 1.
        drop_rate: Dropout before the head.
        drop_path_rate: Rate of the last block; the others' grow up to it.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if a setting per stage has not four entries, or heads do not divide the channels.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 80,
        stem_dim: int = 32,
        depths: Sequence[int] = (1, 3, 8, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window_size: Sequence[int] = (8, 8, 14, 7),
        mlp_ratio: float = 4.0,
        d_state: int = 8,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, values in (("depths", depths), ("num_heads", num_heads), ("window_size", window_size)):
            check_per_stage(name, values, 4)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [dim * 2**k for k in range(4)]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))

        def create_block(width: int, heads: int, scanned: bool, rate: float) -> nn.Module:
            mixer = HalfScan(width, d_state=d_state, **factory) if scanned else Attention(width, heads, **factory)
            norms = [nn.LayerNorm(width, **factory) for _ in range(2)]
            scales = [LayerScale(width, layer_scale, **factory) if layer_scale else None for _ in range(2)]
            mlp = Mlp(width, int(mlp_ratio * width), **factory)
            return Block(norms[0], mixer, norms[1], mlp, rate, scales[0], scales[1])

        self.stem = Stem(in_chans, stem_dim, dim, **factory)
        stages: list[nn.Module] = []
        for k, (width, depth) in enumerate(zip(dims, depths, strict=True)):
            down = nn.Conv2d(width // 2, width, 3, 2, 1, bias=False, **factory) if k else None
            if k < 2:
                stages.append(
                    Stage(down, [ConvBlock(width, next(rates), layer_scale_conv, **factory) for _ in range(depth)])
                )
                continue
            scanned = [j < math.ceil(depth / 2) for j in range(depth)]
            blocks = [create_block(width, num_heads[k], scan, next(rates)) for scan in scanned]
            stages.append(WindowStage(down, blocks, window_size[k]))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(dims[-1], **factory)
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, **factory)
        self._describe(in_chans, num_classes, dims)
        init_linear_(self)


_PUBLISHED = (
    (r"^patch_embed\.conv_down\.0\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.1\.", "stem.norm1."),
    (r"^patch_embed\.conv_down\.3\.", "stem.conv2."),
    (r"^patch_embed\.conv_down\.4\.", "stem.norm2."),
    (r"^(levels\.[23]\.blocks\.\d+)\.norm1\.", r"\1.norm."),
    (r"^(levels\.[23]\.blocks\.\d+)\.norm2\.", r"\1.mlp_norm."),
    (r"\.gamma_1$", ".scale.gamma"),
    (r"\.gamma_2$", ".mlp_scale.gamma"),
    (r"(\.blocks\.\d+)\.gamma$", r"\1.scale.gamma"),
    (r"\.downsample\.reduction\.0\.", ".downsample."),
    (r"^head\.(?=weight|bias)", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: MambaVision) -> dict[str, Tensor]:
    """Weights under our names, from ours or the published ones (`levels.i.*`).

    There, `levels.i.downsample` stands behind the blocks of stage i; here it belongs to stage i + 1. The released code
    adds the bias of the steps twice, so a published bias is doubled here, which gives the same function.
    """
    state = unwrapped(state_dict)
    if not any(name.startswith("levels.") for name in state):
        return state
    own = model.state_dict()
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("dt_proj.bias"):
            tensor = 2 * tensor
        for pattern, replacement in _PUBLISHED:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^levels\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", name)
        name = re.sub(r"^levels\.", "stages.", name)
        renamed[name] = tensor.reshape(own[name].shape) if name.endswith("gamma") and name in own else tensor
    return renamed


_create = partial(create_pyramid, MambaVision, checkpoint_filter_fn)


default_cfgs = generate_default_cfgs(
    {
        f"mambavision_{name}.untrained": pyramid_cfg("arXiv:2407.08083", "stem.conv1", "head.fc", crop_pct=crop)
        for name, crop in {
            "tiny": 1.0,
            "tiny2": 0.98,
            "small": 0.93,
            "base": 1.0,
            "large": 1.0,
            "large2": 1.0,
        }.items()
    }
)


@register_model
def mambavision_tiny(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """80 channels, depths 1 3 8 4."""
    return _create("mambavision_tiny", pretrained, **kwargs)


@register_model
def mambavision_tiny2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """80 channels, depths 1 3 11 4."""
    return _create("mambavision_tiny2", pretrained, **{"depths": (1, 3, 11, 4), **kwargs})


@register_model
def mambavision_small(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """96 channels, depths 3 3 7 5."""
    return _create("mambavision_small", pretrained, **{"dim": 96, "stem_dim": 64, "depths": (3, 3, 7, 5), **kwargs})


@register_model
def mambavision_base(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """128 channels, depths 3 3 10 5, layer scale."""
    size = {"dim": 128, "stem_dim": 64, "depths": (3, 3, 10, 5), "layer_scale": 1e-5}
    return _create("mambavision_base", pretrained, **{**size, **kwargs})


_LARGE: dict[str, Any] = {"dim": 196, "stem_dim": 64, "num_heads": (4, 8, 16, 32), "layer_scale": 1e-5}


@register_model
def mambavision_large(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """196 channels, depths 3 3 10 5, layer scale."""
    return _create("mambavision_large", pretrained, **{**_LARGE, "depths": (3, 3, 10, 5), **kwargs})


@register_model
def mambavision_large2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """196 channels, depths 3 3 12 5, layer scale."""
    return _create("mambavision_large2", pretrained, **{**_LARGE, "depths": (3, 3, 12, 5), **kwargs})
