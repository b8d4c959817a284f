"""PlainMamba: tokens of one width, mixed along four snakes through the grid that share their weights.

    stem   conv 7 x 7 / 2 -> 64, k times conv 3 x 3, each with BatchNorm and ReLU, then one convolution to patches
    block  x + drop_path(mixer(LayerNorm(x))), in chosen blocks followed by a depthwise 3 x 3 convolution, norm and gelu
    mixer  [x | z] = in_proj(u);  x = silu(depthwise 7 x 7 (x));  [dt | B | C] = x_proj(x)
           for each order o of the cells:  y_o = selective_scan(x, dt, A, B + theta[step of o that led here], C, D)
           out_proj(silu(z) * sum of y_o at their cells)

Orders run along rows and along columns, every second line backwards, and both from their ends. Positions are learned.
Source: Yang et al. (2024), PlainMamba, section 3.

    name                       width  depth  parameters
    plainmamba_l1_patch16_224    192     24   7,551,656
    plainmamba_l2_patch16_224    384     24  26,145,832
    plainmamba_l3_patch16_224    448     36  50,956,456
"""

# No postponed annotations here: TorchScript reads those of the functions that it leaves alone.

import math
import re
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn

from ...ssmcore.init import a_log_init, dt_bias_init
from ..layers import SNAKE4, PatchEmbed, check_image_size, init_linear_, pad_image, scan_order
from ..scans import at_least_float32, raw_steps, selective_mix
from .settings import create_tokens, token_cfg
from .token_model import TokenModel, fitted, resampled_positions, unwrapped


class SnakeMixer(nn.Module):
    """Mixes a grid (b, i, j, d_model) by one selective scan along four snakes.

    Args:
        d_model: Width of the stream.
        d_state: States per inner channel.
        d_conv: Side of the depthwise convolution, odd.
        expand: Inner width over `d_model`.
        order_all: Take steps and maps in the order of the scan, as the input; without it they stay in raster order,
            as in released code.
        dt_min: Shortest initial step.
        dt_max: Longest one.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if the convolution's side is even.
    """

    own_init = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 7,
        expand: int = 2,
        order_all: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, got {d_conv}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": at_least_float32(dtype)}
        d_inner = expand * d_model
        self.d_state, self.dt_rank, self.order_all = d_state, math.ceil(d_model / 16), order_all
        self.in_proj = nn.Linear(d_model, 2 * d_inner, **factory)
        self.conv2d = nn.Conv2d(d_inner, d_inner, d_conv, padding=d_conv // 2, groups=d_inner, **factory)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner, **factory)
        self.A_log = nn.Parameter(a_log_init(d_inner, d_state, **wide))
        self.D = nn.Parameter(torch.ones(d_inner, **wide))
        self.out_proj = nn.Linear(d_inner, d_model, **factory)
        self.move_B = nn.Parameter(torch.zeros(5, d_state, **factory))  # start, right, left, up, down
        nn.init.trunc_normal_(self.move_B, std=0.02)
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt_bias_init(d_inner, dt_min, dt_max, **factory))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("A_log", "D", "dt_proj.bias", "move_B")

    def forward(self, x: Tensor) -> Tensor:
        """Mix (b, i, j, d_model)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = raw_steps(dt, self.dt_proj.weight, self.dt_proj.bias)
        y = scan_snakes(u, dt, self.A_log, B, C, self.D, self.move_B, self.order_all)
        return self.out_proj((y * F.silu(z)).to(x.dtype))


@register_notrace_function
@torch.jit.ignore
def scan_snakes(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, move_B: Tensor, order_all: bool
) -> Tensor:
    """Selective scans along four snakes, summed at the cells in float32.

    Args:
        x: Grid, (b, i, j, d).
        dt: Steps before softplus, (b, i, j, d).
        A_log: Logarithm of the decay rates, (d, n).
        B: Input maps, (b, i, j, n).
        C: Output maps, like `B`.
        D: Skip, (d,).
        move_B: Added to B by the step that led to a cell, (5, n).
        order_all: Read dt, B and C in the order of the scan; without it in raster order, x alone follows the scan.

    Returns:
        (b, i, j, d).
    """
    batch, rows, columns = x.shape[:3]
    orders = [scan_order(name, rows, columns, x.device) for name in SNAKE4]
    order = torch.cat([each.order for each in orders])

    def along(tensor: Tensor, follow: bool) -> Tensor:
        """(b, i, j, d) as four sequences, (4 b, l, d)."""
        flat = tensor.flatten(1, 2)
        if follow:
            return flat.index_select(1, order).unflatten(1, (4, -1)).flatten(0, 1)
        return flat[:, None].expand(-1, 4, -1, -1).flatten(0, 1)

    moves = move_B.to(B.dtype)[torch.stack([each.move for each in orders])]  # (4, l, n)
    B4 = (along(B, order_all).unflatten(0, (batch, 4)) + moves).flatten(0, 1)
    y = selective_mix(along(x, True), along(dt, order_all), None, A_log, B4, along(C, order_all), D, 0)
    y = y.unflatten(0, (batch, 4))
    return torch.stack([y[:, k].index_select(1, each.inverse) for k, each in enumerate(orders)]).sum(0).view(x.shape)


class SnakeBlock(nn.Module):
    """x + drop_path(mixer(norm(x))) on a grid (b, i, j, d), then if asked gelu(BatchNorm(depthwise 3 x 3))."""

    def __init__(self, mixer: SnakeMixer, dim: int, drop_path: float, local: bool, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **factory)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.has_local = local
        conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **factory) if local else nn.Identity()
        self.local = nn.Sequential(conv, nn.BatchNorm2d(dim, **factory), nn.GELU()) if local else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Pass the stream through the block."""
        x = x + self.drop_path(self.mixer(self.norm(x)))
        if self.has_local:
            x = self.local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x


class ConvPatches(PatchEmbed):
    """Patches by a convolution on maps of half the size; see the module's text.

    Args:
        img_size: Height and width that the model is built for, pixels.
        patch_size: Side of a patch, even.
        in_chans: Channels of an image.
        embed_dim: Width of a token.
        convs: Convolutions of 3 x 3 after the first one.
        dynamic: Take images of any size; maps are padded with zeros below and on the right.
        **factory: Device and dtype of the parameters.

    Raises:
        ValueError: if the patch size is odd.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        convs: int,
        dynamic: bool,
        **factory: Any,
    ) -> None:
        super().__init__(img_size, patch_size, 1, 1, dynamic=dynamic, device="meta")
        if patch_size % 2:
            raise ValueError(f"patch_size must be even, got {patch_size}.")
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False, **factory), nn.BatchNorm2d(64, **factory), nn.ReLU()
        )
        layers: list[nn.Module] = []
        for _ in range(convs):
            layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False, **factory), nn.BatchNorm2d(64, **factory), nn.ReLU()]
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(64, embed_dim, patch_size // 2, patch_size // 2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (b, i, j, d), in the dtype of the weights."""
        if not self.dynamic:
            x = check_image_size(x, self.img_size[0], self.img_size[1])
        x = self.convs(self.stem(x))
        if self.dynamic:
            x = pad_image(x, self.patch_size // 2, self.patch_size // 2)
        return self.proj(x).permute(0, 2, 3, 1).to(self.proj.weight.dtype)


class PlainMamba(TokenModel):
    """PlainMamba.

    Args:
        img_size: Height and width of the images, pixels.
        patch_size: Side of a patch, even.
        in_chans: Channels of an image.
        embed_dim: Width of the stream.
        depth: Number of blocks.
        d_state: States per inner channel.
        convs: Convolutions of 3 x 3 inside the stem.
        local_blocks: Numbers of the blocks that end with a depthwise convolution.
        order_all: Take steps and maps in the order of each scan; False leaves them in raster order, as in released
            code. None is what the weights that are loaded were trained with: False of published ones; first True.
        dynamic_img_size: Take images of any size; positions are resampled.
        device: Where to create the parameters.
        dtype: Their dtype.
        **options: Further options of `TokenModel`: `num_classes`, `global_pool`, `drop_rate`, `drop_path_rate`, ...

    Raises:
        ValueError: if the patch size is odd.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        convs: int = 1,
        local_blocks: Collection[int] = (),
        order_all: bool | None = None,
        dynamic_img_size: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def create_block(k: int, rate: float) -> nn.Module:
            mixer = SnakeMixer(embed_dim, d_state=d_state, order_all=order_all is not False, **factory)
            return SnakeBlock(mixer, embed_dim, rate, k in local_blocks, **factory)

        super().__init__(
            create_block,
            nn.LayerNorm(embed_dim, eps=1e-6, **factory),
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            keep_grid=True,
            dynamic_img_size=dynamic_img_size,
            **factory,
            **options,
        )
        self.order_all = order_all
        # goes with the weights, which are those of another function without it
        self.register_buffer("order_all_maps", torch.tensor(order_all is not False, device=device))
        self.patch_embed = ConvPatches(img_size, patch_size, in_chans, embed_dim, convs, dynamic_img_size, **factory)
        init_linear_(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}order_all_maps"
        if self.order_all is not None:
            state_dict[name] = torch.tensor(self.order_all)
        elif name in state_dict:
            for module in self.modules():
                if isinstance(module, SnakeMixer):
                    module.order_all = bool(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def embed(self, x: Tensor) -> Tensor:
        """Patches with positions: (batch, channels, height, width) -> (b, i, j, d)."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            rows, columns = x.shape[1], x.shape[2]
            table = self.pos_embed
            if self.dynamic_img_size:
                old_rows, old_columns = self.patch_embed.grid_size
                table = resampled_positions(table, old_rows, old_columns, rows, columns, self.class_token)
            x = x + table.unflatten(1, [rows, columns])
        return self.pos_drop(x)


_PUBLISHED = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.mamba\.", r"blocks.\1.mixer."),
    (r"^layers\.(\d+)\.dw\.", r"blocks.\1.local."),
    (r"^layers\.", "blocks."),
    (r"\.direction_Bs$", ".move_B"),
    (r"^ln1\.", "norm."),
    (r"^head\.fc\.", "head."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: PlainMamba) -> dict[str, Tensor]:
    """Weights under our names, from ours or the published ones (`backbone.layers.k.mamba.*`, `ln1`), sizes fitted.

    The released code adds the bias of the steps twice, so a published bias is doubled here, which gives the same
    function; and the model that loads them reads steps and maps in raster order, unless `order_all` was given.
    """
    state = {name.removeprefix("backbone."): tensor for name, tensor in unwrapped(state_dict).items()}
    if any(name.startswith("layers.") for name in state):
        renamed = {}
        for name, tensor in state.items():
            for pattern, replacement in _PUBLISHED:
                name = re.sub(pattern, replacement, name)
            renamed[name] = 2 * tensor if name.endswith("dt_proj.bias") else tensor
        state = {**renamed, "order_all_maps": torch.tensor(False)}
    return fitted(state, model)


_create = partial(create_tokens, PlainMamba, checkpoint_filter_fn)


default_cfgs = generate_default_cfgs(
    {
        f"plainmamba_{size}_patch16_224.untrained": token_cfg("arXiv:2403.17695", first_conv="patch_embed.stem.0")
        for size in ("l1", "l2", "l3")
    }
)


@register_model
def plainmamba_l1_patch16_224(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """192 wide, 24 blocks, the first one with a convolution."""
    size = {"embed_dim": 192, "depth": 24, "convs": 1, "local_blocks": (0,)}
    return _create("plainmamba_l1_patch16_224", pretrained, **{**size, **kwargs})


@register_model
def plainmamba_l2_patch16_224(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """384 wide, 24 blocks."""
    size = {"embed_dim": 384, "depth": 24, "convs": 2}
    return _create("plainmamba_l2_patch16_224", pretrained, **{**size, **kwargs})


@register_model
def plainmamba_l3_patch16_224(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """448 wide, 36 blocks."""
    size = {"embed_dim": 448, "depth": 36, "convs": 2}
    return _create("plainmamba_l3_patch16_224", pretrained, **{**size, **kwargs})
