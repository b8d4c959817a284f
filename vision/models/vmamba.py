"""VMamba: a pyramid whose blocks scan the map along four orders of its cells.

    stem   conv 3 x 3 / 2 -> C/2, LayerNorm, GELU, conv 3 x 3 / 2 -> C, LayerNorm
    block  x + drop_path(SS2D(LayerNorm(x)));   x + drop_path(MLP(LayerNorm(x)))
    between stages: conv 3 x 3 / 2 -> 2C, LayerNorm                    head: LayerNorm, mean, linear

    SS2D   x = silu(depthwise 3 x 3 (in_proj x)); for each order k of (rows, columns, and both backwards)
           [dt | B | C] = W_k x_k;   y_k = selective_scan(x_k, softplus(V_k dt + b_k), -exp(A_k), B, C, D_k)
           out_proj(LayerNorm(sum of y_k at their cells))

The first generation (`vmamba_v0_*`) has no MLP, a gate silu(z) after that norm, one 4 x 4 convolution as stem, and
merges 2 x 2 patches between stages.
Source: Liu et al. (2024), VMamba, sections 4 and 5.

    name               C    depths    ratio  parameters
    vmamba_tiny_s1l8   96   2 2 8 2       1  30,249,064
    vmamba_tiny_s2l5   96   2 2 5 2       2  30,705,832
    vmamba_small_s1l20 96   2 2 20 2      1  49,012,840
    vmamba_small_s2l15 96   2 2 15 2      2  50,147,752
    vmamba_base_s1l20  128  2 2 20 2      1  86,614,504
    vmamba_base_s2l15  128  2 2 15 2      2  88,557,800
    vmamba_v0_tiny     96   2 2 9 2       2  22,893,448
    vmamba_v0_small    96   2 2 27 2      2  44,417,416
    vmamba_v0_base     128  2 2 27 2      2  76,254,056
"""

# No postponed annotations here: TorchScript reads those of the functions that it leaves alone.

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn

from ...ssmcore.init import a_log_init, dt_bias_init
from ..layers import drop_path_rates, init_linear_, pad_grid
from ..scans import at_least_float32, cross_mix
from .pyramid import ChannelNorm, GridStage, Head, Pyramid, check_per_stage
from .settings import create_pyramid, pyramid_cfg
from .token_model import Block, Mlp, unwrapped


class SS2D(nn.Module):
    """Mixes a grid (b, i, j, d_model) by selective scans along four orders of its cells.

    Args:
        d_model: Width of the stream.
        d_state: States per inner channel.
        ratio: Inner width over `d_model`.
        gated: Multiply the normed output by silu(z), a second half of the input projection.
        conv_bias: Of the depthwise convolution.
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
        d_state: int = 1,
        ratio: float = 1.0,
        gated: bool = False,
        conv_bias: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": at_least_float32(dtype)}
        d_inner = int(ratio * d_model)
        self.d_inner, self.d_state, self.dt_rank = d_inner, d_state, math.ceil(d_model / 16)
        self.gated = gated
        self.in_proj = nn.Linear(d_model, 2 * d_inner if gated else d_inner, bias=False, **factory)
        self.conv2d = nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner, bias=conv_bias, **factory)
        maps = torch.empty(4, self.dt_rank + 2 * d_state, d_inner, **factory)
        self.x_proj_weight = nn.Parameter(nn.init.uniform_(maps, -(d_inner**-0.5), d_inner**-0.5))
        steps = torch.empty(4, d_inner, self.dt_rank, **factory)
        self.dt_projs_weight = nn.Parameter(nn.init.uniform_(steps, -(self.dt_rank**-0.5), self.dt_rank**-0.5))
        self.dt_projs_bias = nn.Parameter(dt_bias_init((4, d_inner), dt_min, dt_max, **wide))
        self.A_logs = nn.Parameter(a_log_init(4 * d_inner, d_state, **wide))
        self.Ds = nn.Parameter(torch.ones(4 * d_inner, **wide))
        self.out_norm = nn.LayerNorm(d_inner, **factory)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False, **factory)
        for linear in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("A_logs", "Ds", "dt_projs_bias")

    def forward(self, x: Tensor) -> Tensor:
        """Mix (b, i, j, d_model)."""
        dtype = x.dtype
        x = self.in_proj(x)
        z = x
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y = scan_four_ways(
            x, self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds, self.d_state
        )
        weight, bias = self.out_norm.weight.to(y.dtype), self.out_norm.bias.to(y.dtype)
        y = F.layer_norm(y, self.out_norm.normalized_shape, weight, bias, self.out_norm.eps)
        if self.gated:
            y = y * F.silu(z)
        return self.out_proj(y.to(dtype))


@register_notrace_function
@torch.jit.ignore
def scan_four_ways(
    x: Tensor, maps: Tensor, steps: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, d_state: int
) -> Tensor:
    """Selective scans along four orders, summed at the cells in float32.

    Args:
        x: Grid, (b, i, j, d).
        maps: To dt, B and C of each order, (4, r + 2 n, d).
        steps: From the r numbers of dt to d steps, (4, d, r).
        dt_bias: (4, d).
        A_log: Logarithm of the decay rates, (4 d, n).
        D: Skip, (4 d,).
        d_state: n.

    Returns:
        (b, i, j, d).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    low = F.linear(x, maps.to(x.dtype).flatten(0, 1)).unflatten(-1, (4, -1)).movedim(-2, 1)  # (b, 4, i, j, r + 2 n)
    dt, B, C = low.split([steps.shape[2], d_state, d_state], dim=-1)
    dt = torch.matmul(dt, steps.to(dt.dtype).mT[:, None])
    dt = F.softplus(dt.to(wide) + dt_bias.to(wide)[:, None, None])
    A = -A_log.to(wide).exp().unflatten(0, (4, -1))
    return cross_mix(x, dt, A, B, C, D.to(wide).view(4, -1))


class ConvStem(nn.Module):
    """Two strided convolutions with norms, or one of 4 x 4 patches for the first generation."""

    def __init__(self, in_chans: int, dim: int, patches: bool, **factory: Any) -> None:
        super().__init__()
        self.patches = patches
        if patches:
            self.conv1 = nn.Conv2d(in_chans, dim, 4, 4, **factory)
            self.norm1 = ChannelNorm(dim, **factory)
            self.conv2: nn.Module = nn.Identity()
            self.norm2: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **factory)
            self.norm1 = ChannelNorm(dim // 2, **factory)
            self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, **factory)
            self.norm2 = ChannelNorm(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Images to maps at stride 4."""
        x = self.norm1(self.conv1(x)).to(self.conv1.weight.dtype)
        return x if self.patches else self.norm2(self.conv2(F.gelu(x))).to(self.conv1.weight.dtype)


class ConvDown(nn.Module):
    """conv 3 x 3 / 2 and LayerNorm."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, 2, 1, **factory)
        self.norm = ChannelNorm(2 * dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Maps to half their sides and twice the channels."""
        return self.norm(self.conv(x)).to(self.conv.weight.dtype)


class MergeDown(nn.Module):
    """Cells of 2 x 2 side by side (rows first), LayerNorm, linear."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, **factory)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Maps to half their sides, rounded up, and twice the channels."""
        x = pad_grid(x.permute(0, 2, 3, 1), 2)
        even, odd = x[:, 0::2], x[:, 1::2]
        x = torch.cat([even[:, :, 0::2], odd[:, :, 0::2], even[:, :, 1::2], odd[:, :, 1::2]], dim=-1)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2).to(self.reduction.weight.dtype)


class VMamba(Pyramid):
    """VMamba.

    Args:
        in_chans: Channels of an image.
        num_classes: Width of the logits; 0 leaves the pooled features.
        global_pool: "avg" or "" (none).
        dim: Channels of the first stage; each further one has twice as many.
        depths: Blocks of each stage.
        d_state: States per inner channel.
        ssm_ratio: Inner width of the scans over the channels.
        mlp_ratio: Inner width of the MLPs over the channels; 0 for none.
        generation: 0 for the first (gate, patch stem and merging), 1 for the present one.
        drop_rate: Dropout before the head.
        drop_path_rate: Rate of the last block; the others' grow up to it.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if `depths` has not four entries, or the generation is unknown.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        generation: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_per_stage("depths", depths, 4)
        if generation not in (0, 1):
            raise ValueError(f"generation must be 0 or 1, got {generation}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        first = generation == 0
        dims = [dim * 2**k for k in range(4)]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))

        def create_block(width: int, rate: float) -> nn.Module:
            mixer = SS2D(width, d_state=d_state, ratio=ssm_ratio, gated=first, conv_bias=first, **factory)
            if mlp_ratio <= 0:
                return Block(nn.LayerNorm(width, **factory), mixer, drop_path=rate)
            mlp = Mlp(width, int(mlp_ratio * width), **factory)
            return Block(nn.LayerNorm(width, **factory), mixer, nn.LayerNorm(width, **factory), mlp, rate)

        self.stem = ConvStem(in_chans, dim, first, **factory)
        stages = []
        for k, (width, depth) in enumerate(zip(dims, depths, strict=True)):
            down = None if k == 0 else MergeDown(width // 2, **factory) if first else ConvDown(width // 2, **factory)
            stages.append(GridStage(down, [create_block(width, next(rates)) for _ in range(depth)]))
        self.stages = nn.Sequential(*stages)
        self.norm = ChannelNorm(dims[-1], **factory)
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, **factory)
        self._describe(in_chans, num_classes, dims)
        init_linear_(self)


_PUBLISHED = (
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.norm\.", "stem.norm1."),
    (r"\.(op|self_attention)\.", ".mixer."),
    (r"\.ln_1\.", ".norm."),
    (r"(\.blocks\.\d+)\.norm2\.", r"\1.mlp_norm."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"^classifier\.norm\.|^norm\.", "norm."),
    (r"^classifier\.head\.|^head\.(?=weight|bias)", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VMamba) -> dict[str, Tensor]:
    """Weights under our names, from ours or the published ones of either generation.

    There, `layers.i.downsample` stands behind the blocks of stage i; here it belongs to stage i + 1.
    """
    state = unwrapped(state_dict)
    own = model.state_dict()
    if any(name.startswith("layers.") for name in state):
        renamed = {}
        for name, tensor in state.items():
            for pattern, replacement in _PUBLISHED:
                name = re.sub(pattern, replacement, name)
            name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", name)
            renamed[re.sub(r"^layers\.", "stages.", name)] = tensor
        state = renamed
    for name, tensor in state.items():
        if name in own and tensor.shape != own[name].shape and tensor.numel() == own[name].numel():
            state[name] = tensor.reshape(own[name].shape)  # 1 x 1 convolutions that are linear maps here
    return state


_create = partial(create_pyramid, VMamba, checkpoint_filter_fn)


_FIRST: dict[str, Any] = {"generation": 0, "d_state": 16, "ssm_ratio": 2.0, "mlp_ratio": 0.0}

default_cfgs = generate_default_cfgs(
    {
        f"vmamba_{name}.untrained": pyramid_cfg("arXiv:2401.10166", "stem.conv1", "head.fc")
        for name in (
            "tiny_s1l8",
            "tiny_s2l5",
            "small_s1l20",
            "small_s2l15",
            "base_s1l20",
            "base_s2l15",
            "v0_tiny",
            "v0_small",
            "v0_base",
        )
    }
)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """96 channels, depths 2 2 8 2, ratio 1."""
    return _create("vmamba_tiny_s1l8", pretrained, **kwargs)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """96 channels, depths 2 2 5 2, ratio 2."""
    return _create("vmamba_tiny_s2l5", pretrained, **{"depths": (2, 2, 5, 2), "ssm_ratio": 2.0, **kwargs})


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """96 channels, depths 2 2 20 2, ratio 1."""
    return _create("vmamba_small_s1l20", pretrained, **{"depths": (2, 2, 20, 2), **kwargs})


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """96 channels, depths 2 2 15 2, ratio 2."""
    return _create("vmamba_small_s2l15", pretrained, **{"depths": (2, 2, 15, 2), "ssm_ratio": 2.0, **kwargs})


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """128 channels, depths 2 2 20 2, ratio 1."""
    return _create("vmamba_base_s1l20", pretrained, **{"dim": 128, "depths": (2, 2, 20, 2), **kwargs})


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """128 channels, depths 2 2 15 2, ratio 2."""
    size = {"dim": 128, "depths": (2, 2, 15, 2), "ssm_ratio": 2.0}
    return _create("vmamba_base_s2l15", pretrained, **{**size, **kwargs})


@register_model
def vmamba_v0_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """First generation, 96 channels, depths 2 2 9 2."""
    return _create("vmamba_v0_tiny", pretrained, **{**_FIRST, "depths": (2, 2, 9, 2), **kwargs})


@register_model
def vmamba_v0_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """First generation, 96 channels, depths 2 2 27 2."""
    return _create("vmamba_v0_small", pretrained, **{**_FIRST, "depths": (2, 2, 27, 2), **kwargs})


@register_model
def vmamba_v0_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """First generation, 128 channels, depths 2 2 27 2."""
    return _create("vmamba_v0_base", pretrained, **{**_FIRST, "dim": 128, "depths": (2, 2, 27, 2), **kwargs})
