"""Chimera on images: blocks that mix the grid of patches by recurrences from its four corners.

    [z | x | B | C | dt] = in_proj(LayerNorm(u));   [x | B | C] = silu(depthwise 3 x 3 convolution)
    u + drop_path(out_proj(RMSNorm(grid_mixer(x, dt, B, C) + D x) silu(z)))

No MLP, no positions and no class token; LayerNorm and the mean over patches before the head.
Source: Lahoti, Marwah, Puduppully & Gu (2025), Chimera, section 5 (images); see `omnissm.vision.grid_mixer`.

    name                          width  depth  d_state  headdim  parameters
    chimera_vit_tiny_patch16_224    192     23       64       32   7,148,112
    chimera_vit_small_patch16_224   384     23       64       64  24,410,256
    chimera_vit_base_patch16_224    768     23       64      128  89,457,936
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ...ssmcore.init import dt_bias_init
from ..grid_mixer import Normalization, grid_mix
from ..layers import init_linear_
from ..scans import at_least_float32
from .settings import create_tokens, token_cfg
from .token_model import Block, TokenModel, fitted, unwrapped


class GridSSM(nn.Module):
    """Mixes a grid (b, i, j, d_model) by state-space recurrences from its four corners.

    Args:
        d_model: Width of the stream.
        d_state: Rows of a head's state.
        headdim: Channels of a head.
        expand: Inner width over `d_model`.
        gate: "silu" multiplies the normed output by silu(z); "add" norms the sum with z, which is what the released
            code of the paper computes.
        normalization: Of the weights of a cell's neighbours, see `grid_mix`.
        published_gain: Give each corner's own cell a gain of 0, as in the released code.
        dt_min: Shortest initial step.
        dt_max: Longest one.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if `headdim` does not divide the inner width, or an option is unknown.
    """

    own_init = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        headdim: int = 64,
        expand: int = 2,
        gate: Literal["silu", "add"] = "silu",
        normalization: Normalization = "auto",
        published_gain: bool = False,
        dt_min: float = 7e-3,
        dt_max: float = 0.7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": at_least_float32(dtype)}
        d_inner = expand * d_model
        if d_inner % headdim:
            raise ValueError(f"headdim must divide the inner width {d_inner}, got {headdim}.")
        if gate not in ("silu", "add"):
            raise ValueError(f"gate must be 'silu' or 'add', got {gate!r}.")
        self.d_inner, self.d_state, self.headdim = d_inner, d_state, headdim
        self.nheads = d_inner // headdim
        self.gate = gate
        self.normalization = normalization
        self.published_gain = published_gain
        mixed = d_inner + 4 * d_state
        self.in_proj = nn.Linear(d_model, d_inner + mixed + 8 * self.nheads, bias=False, **factory)
        self.conv2d = nn.Conv2d(mixed, mixed, 3, padding=1, groups=mixed, **factory)
        self.dt_bias = nn.Parameter(dt_bias_init(self.nheads, dt_min, dt_max, **wide))
        self.D = nn.Parameter(torch.ones(self.nheads, **wide))
        self.norm = nn.RMSNorm(d_inner, eps=1e-5, **factory)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False, **factory)
        for linear in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("dt_bias", "D")

    def forward(self, x: Tensor) -> Tensor:
        """Mix (b, i, j, d_model)."""
        dtype = x.dtype
        z, mixed, dt = self.in_proj(x).split([self.d_inner, self.d_inner + 4 * self.d_state, 8 * self.nheads], dim=-1)
        mixed = F.silu(self.conv2d(mixed.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        x, B, C = mixed.split([self.d_inner, 2 * self.d_state, 2 * self.d_state], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        y = grid_mix(
            x,
            dt.unflatten(-1, (self.nheads, 4, 2)),
            self.dt_bias,
            B.unflatten(-1, (2, self.d_state)),
            C.unflatten(-1, (2, self.d_state)),
            self.normalization,
            self.published_gain,
        )
        y = (y + self.D[:, None] * x).flatten(-2)
        if self.gate == "add":
            y = y + z
        y = F.rms_norm(y, self.norm.normalized_shape, self.norm.weight.to(y.dtype), self.norm.eps)
        if self.gate == "silu":
            y = y * F.silu(z)
        return self.out_proj(y.to(dtype))


class ChimeraViT(TokenModel):
    """Chimera on images.

    Args:
        img_size: Height and width of the images, pixels.
        patch_size: Side of a patch.
        embed_dim: Width of the stream.
        depth: Number of blocks.
        d_state: Rows of a head's state.
        headdim: Channels of a head.
        gate: "silu" or "add", see `GridSSM`.
        normalization: "auto", "sqrt_in" or "in", see `grid_mix`.
        published_gain: Give each corner's own cell a gain of 0.
        drop_path_rate: Rate of the last block.
        device: Where to create the parameters.
        dtype: Their dtype.
        **options: Further options of `TokenModel`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 23,
        d_state: int = 64,
        headdim: int = 64,
        gate: Literal["silu", "add"] = "silu",
        normalization: Normalization = "auto",
        published_gain: bool = False,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def create_block(k: int, rate: float) -> nn.Module:
            mixer = GridSSM(
                embed_dim,
                d_state=d_state,
                headdim=headdim,
                gate=gate,
                normalization=normalization,
                published_gain=published_gain,
                **factory,
            )
            return Block(nn.LayerNorm(embed_dim, eps=1e-5, **factory), mixer, drop_path=rate)

        super().__init__(
            create_block,
            nn.LayerNorm(embed_dim, eps=1e-5, **factory),
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            pos_embed="none",
            keep_grid=True,
            drop_path_rate=drop_path_rate,
            **factory,
            **options,
        )
        init_linear_(self)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ChimeraViT) -> dict[str, Tensor]:
    """Weights under our names, with patch filters resampled where their size differs."""
    return fitted(unwrapped(state_dict), model)


_create = partial(create_tokens, ChimeraViT, checkpoint_filter_fn)


default_cfgs = generate_default_cfgs(
    {f"chimera_vit_{size}_patch16_224.untrained": token_cfg("") for size in ("tiny", "small", "base")}
)


@register_model
def chimera_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ChimeraViT:
    """192 wide, 23 blocks, 32 channels per head."""
    return _create("chimera_vit_tiny_patch16_224", pretrained, **{"embed_dim": 192, "headdim": 32, **kwargs})


@register_model
def chimera_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ChimeraViT:
    """384 wide, 23 blocks, 64 channels per head."""
    return _create("chimera_vit_small_patch16_224", pretrained, **{"embed_dim": 384, "headdim": 64, **kwargs})


@register_model
def chimera_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ChimeraViT:
    """768 wide, 23 blocks, 128 channels per head."""
    return _create("chimera_vit_base_patch16_224", pretrained, **{"embed_dim": 768, "headdim": 128, **kwargs})
