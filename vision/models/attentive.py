"""What A2Mamba and SegMAN share: stem, blocks with depthwise positions, rotary attention, and head.

    stem    conv 3 x 3 (/ 2), conv 3 x 3, conv 3 x 3 (/ 2), conv 3 x 3, each with BatchNorm, GELU between
    block   x + conv(x);  x + drop_path(scale(mixer(LN x)));  x + conv(x);  x + drop_path(scale(FFN(LN x)))
            conv is depthwise 3 x 3;  FFN = fc2(a + conv(a)), a = gelu(fc1(x))
    between stages: conv 3 x 3 / 2, BatchNorm          head: conv 1 x 1 to 1024, BatchNorm, silu, mean, linear

Queries and keys turn by rotary positions: of the h channels of a head the first half by row, the second by column,
pairs (2 t, 2 t + 1) by position times 10000^(-t / (h/4 - 1)). Source: Lou, Fu & Yu (2025), A2Mamba, section 3.
"""

# No postponed annotations here: TorchScript reads those of the functions that it leaves alone.

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import register_notrace_function
from torch import Tensor, nn

from ..layers import drop_path_rates
from ..neighborhood import neighborhood_average, neighborhood_scores
from .pyramid import ChannelNorm, Head, Pyramid, Stage, check_per_stage
from .token_model import unwrapped

TableResize = Literal["grid", "image"]


def conv_stem(in_chans: int, dim: int, **factory: Any) -> nn.Sequential:
    """Images to maps at stride 4, in four convolutions."""
    half = dim // 2
    layers: list[nn.Module] = []
    for before, after, stride in ((in_chans, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)):
        conv = nn.Conv2d(before, after, 3, stride, 1, bias=False, **factory)
        layers += [conv, nn.BatchNorm2d(after, **factory), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def conv_down(dim: int, out: int, **factory: Any) -> nn.Sequential:
    """Maps to half their sides."""
    return nn.Sequential(nn.Conv2d(dim, out, 3, 2, 1, bias=False, **factory), nn.BatchNorm2d(out, **factory))


class ConvMlp(nn.Module):
    """fc2(a + conv(a)), a = gelu(fc1(x)), on maps; conv is depthwise 3 x 3."""

    def __init__(self, dim: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1, **factory)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **factory)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, dim, i, j) to itself."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class ChannelScale(nn.Module):
    """weight * x + bias per channel of maps, the weight at first `value`, the bias 0."""

    def __init__(self, dim: int, value: float, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), value, **factory))
        self.bias = nn.Parameter(torch.zeros(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel."""
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class AttentiveBlock(nn.Module):
    """A mixer and an MLP on maps, each behind a depthwise convolution that tells positions; see the module's text.

    Args:
        mixer: Maps (batch, dim, i, j) to itself.
        dim: Channels.
        hidden: Inner width of the MLP.
        drop_path: Share of samples whose branch is left out while training.
        scale: First value of learned factors, or None.
        scale_stream: Put them on the stream instead of the branches.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        mixer: nn.Module,
        dim: int,
        hidden: int,
        drop_path: float = 0.0,
        scale: float | None = None,
        scale_stream: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.place = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.norm = ChannelNorm(dim, eps=1e-6, **factory)
        self.mixer = mixer
        self.mlp_place = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.mlp_norm = ChannelNorm(dim, eps=1e-6, **factory)
        self.mlp = ConvMlp(dim, hidden, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.scale_stream = scale_stream
        self.scale = nn.Identity() if scale is None else ChannelScale(dim, scale, **factory)
        self.mlp_scale = nn.Identity() if scale is None else ChannelScale(dim, scale, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Pass maps (batch, dim, i, j)."""
        x = x + self.place(x)
        y = self.mixer(self.norm(x))
        if self.scale_stream:
            x = self.scale(x) + self.drop_path(y)
        else:
            x = x + self.drop_path(self.scale(y))
        x = x + self.mlp_place(x)
        y = self.mlp(self.mlp_norm(x))
        if self.scale_stream:
            return self.mlp_scale(x) + self.drop_path(y)
        return x + self.drop_path(self.mlp_scale(y))


class ProjectedHead(Head):
    """conv 1 x 1, BatchNorm, silu, then mean, dropout and a linear map; without pooling the maps come out as they are.

    Args:
        dim: Channels of the maps.
        hidden: Channels of the projection.
        num_classes: Width of the logits; 0 leaves the pooled projection.
        global_pool: "avg" or "" (none).
        drop_rate: Dropout before the linear map.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_classes: int,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.dim, self.in_features = dim, hidden
        self.drop = nn.Dropout(drop_rate)
        self.project: nn.Module = nn.Identity()
        self.reset(num_classes, global_pool, device, dtype)

    def reset(
        self,
        num_classes: int,
        global_pool: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """New linear map, and another pooling if given; the projection comes and goes with the pooling.

        Raises:
            ValueError: if the pooling is unknown, or there is none before a linear map.
        """
        super().reset(num_classes, global_pool, device, dtype)
        if not self.global_pool:
            self.project = nn.Identity()
        elif isinstance(self.project, nn.Identity):
            conv = nn.Conv2d(self.dim, self.in_features, 1, device=device, dtype=dtype)
            init_maps_(conv)
            norm = nn.BatchNorm2d(self.in_features, device=device, dtype=dtype)
            self.project = nn.Sequential(conv, norm, nn.SiLU())

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of maps (batch, channels, height, width)."""
        x = self.project(x)
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


def init_maps_(module: nn.Module) -> None:
    """Normal(0, 0.02) cut at two units and zero bias for all convolutions and linear maps inside."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def check_heads(dim: int, num_heads: int, even: bool = False) -> None:
    """Check that heads fit.

    Raises:
        ValueError: if they do not divide the channels into multiples of 4, or are odd where pairs are needed.
    """
    if num_heads < 1 or dim % num_heads or dim // num_heads % 4:
        raise ValueError(f"num_heads must divide {dim} channels into heads of a multiple of 4, got {num_heads}.")
    if even and num_heads % 2:
        raise ValueError(f"num_heads must be even, got {num_heads}.")


@register_notrace_function
@torch.jit.ignore
def rotated_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, turned and divided by sqrt(c), turned keys, and values: (b, 3 h c, i, j) -> 3 times (b, h, i, j, c)."""
    q, k, v = qkv.unflatten(1, (3, num_heads, -1)).permute(1, 0, 2, 4, 5, 3).unbind(0)
    rows, columns, width = q.shape[2:]
    wide = torch.promote_types(q.dtype, torch.float32)
    rates = 10000 ** -torch.linspace(0, 1, width // 4, device=q.device, dtype=wide).repeat_interleave(2)
    by_row = torch.arange(rows, device=q.device, dtype=wide)[:, None] * rates
    by_column = torch.arange(columns, device=q.device, dtype=wide)[:, None] * rates
    shape = (rows, columns, -1)
    angles = torch.cat([by_row[:, None].expand(shape), by_column[None].expand(shape)], dim=-1)
    sin, cos = angles.sin(), angles.cos()

    def turned(x: Tensor) -> Tensor:
        crossed = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos + crossed * sin

    return (turned(q) * width**-0.5).to(q.dtype), turned(k).to(k.dtype), v


@register_notrace_function
@torch.jit.ignore
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Softmax over each cell's window, and the values' averages.

    Args:
        q: Queries, (b, h, i, j, c).
        k: Keys, like `q`.
        v: Values, like `q`.
        bias: By relative position, (h, 2 window - 1, 2 window - 1).
        window: Side of the window, odd.
        dilation: Largest distance of its cells.

    Returns:
        Weights (b, h, i, j, rows' window, columns' window), and (b, h, i, j, c).
    """
    scores = neighborhood_scores(q, k, bias, window, dilation)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.flatten(-2).softmax(-1, dtype=wide).view(scores.shape)
    return weights, neighborhood_average(weights, v, window, dilation)


@register_notrace_function
@torch.jit.ignore
def global_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: list[int], as_image: bool) -> Tensor:
    """Softmax over all cells: heads (b, h, i, j, c) -> maps (b, h c, i, j).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        table: Added to the scores, (h, l, l), for the cells of `grid` row by row.
        grid: Rows and columns that the table is made for.
        as_image: At another size resample the table as one image of l x l, as released; without it by the grid of
            queries and the grid of keys.
    """
    rows, columns = q.shape[2], q.shape[3]
    table = resampled_table(table, grid[0], grid[1], rows, columns, as_image)
    # Queries come divided by sqrt(c) already.
    y = F.scaled_dot_product_attention(
        q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3).to(q.dtype), attn_mask=table.to(q.dtype), scale=1.0
    )
    return y.mT.flatten(1, 2).unflatten(2, (rows, columns))


def resampled_table(table: Tensor, old_rows: int, old_columns: int, rows: int, columns: int, as_image: bool) -> Tensor:
    """Table (h, l, l) of pairs of cells of one grid for those of another one, bicubic; see `global_attention`."""
    if (old_rows, old_columns) == (rows, columns):
        return table
    wide = torch.promote_types(table.dtype, torch.float32)
    size, cells = [rows, columns], rows * columns
    with torch.autocast(table.device.type, enabled=False):
        if as_image:
            return F.interpolate(table[None].to(wide), size=[cells, cells], mode="bicubic")[0].to(table.dtype)
        found = table.to(wide)
        for _ in range(2):  # keys, then queries
            found = F.interpolate(found.unflatten(2, (old_rows, old_columns)), size=size, mode="bicubic")
            found = found.flatten(2).mT
        return found.to(table.dtype)


@register_notrace_function
@torch.jit.ignore
def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the channels of maps, in the dtype of the maps."""
    cells = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight.to(x.dtype), bias.to(x.dtype), 1e-6)
    return cells.permute(0, 3, 1, 2).to(x.dtype)


class AttentiveMixer(nn.Module):
    """Queries, keys, values and tables of attention in windows, and over all cells; base of mixers of maps.

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

    __constants__ = ("is_global",)  # TorchScript compiles only the branch taken
    paired = False  # two halves of the heads share one table of windows

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
        super().__init__()
        check_heads(dim, num_heads, even=self.paired)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.window = dim, num_heads, window
        self.is_global, self.table_as_image = grid is not None, table_as_image
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, **factory)
        side = 2 * window - 1
        self.bias_table = nn.Parameter(torch.zeros(num_heads // (1 + self.paired), side, side, **factory))
        self.grid = list(grid or (0, 0))
        if grid is not None:
            cells = grid[0] * grid[1]
            self.global_table = nn.Parameter(torch.zeros(num_heads, cells, cells, **factory))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("bias_table", "global_table")


class AttentivePyramid(Pyramid):
    """Stem, four stages of `AttentiveBlock` and the head; the last stage has a table of pairs of cells.

    Args:
        img_size: Height and width of the images that the table of the last stage is made for, pixels; any other size
            works too.
        in_chans: Channels of an image.
        num_classes: Width of the logits; 0 leaves the pooled features.
        global_pool: "avg" or "" (none).
        dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage, even, each of a multiple of 4 channels.
        window_size: Side of the windows of each stage, odd; less where a grid is smaller.
        mlp_ratios: Inner widths of the MLPs over the channels.
        layer_scale: First value of learned factors of each stage; None for none.
        scale_stream: Stages whose factors are on the stream, not on the branches.
        head_dim: Channels before the linear map.
        table_resize: How the table of pairs of cells follows another image size: "grid" resamples over queries and
            over keys; "image" takes it as one image of l x l, as released.
        drop_rate: Dropout before the head.
        drop_path_rate: Rate of the last block; the others' grow up to it.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if a setting per stage has not four entries, heads do not fit, a window is even, or an option has
            an unknown value.
    """

    mixer: type[AttentiveMixer]  # of the blocks

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (32, 64, 128, 192),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (2, 2, 4, 8),
        window_size: Sequence[int] = (11, 9, 7, 7),
        mlp_ratios: Sequence[float] = (4, 4, 3, 3),
        layer_scale: Sequence[float | None] = (None, None, None, None),
        scale_stream: Sequence[bool] = (False, False, False, False),
        head_dim: int = 1024,
        table_resize: TableResize = "grid",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        settings: dict[str, Sequence[Any]] = {"dims": dims, "depths": depths, "num_heads": num_heads}
        settings |= {"window_size": window_size, "mlp_ratios": mlp_ratios}
        settings |= {"layer_scale": layer_scale, "scale_stream": scale_stream}
        for name, values in settings.items():
            check_per_stage(name, values, 4)
        if table_resize not in ("grid", "image"):
            raise ValueError(f"table_resize must be 'grid' or 'image', got {table_resize!r}.")
        if any(window % 2 == 0 for window in window_size):
            raise ValueError(f"window_size must be odd, got {list(window_size)}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.table_grid = (math.ceil(height / 32), math.ceil(width / 32))
        self.table_as_image = table_resize == "image"
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))

        def create_block(k: int) -> nn.Module:
            grid = self.table_grid if k == 3 else None
            mixer = self.mixer(dims[k], num_heads[k], window_size[k], grid, self.table_as_image, **factory)
            hidden = int(mlp_ratios[k] * dims[k])
            return AttentiveBlock(mixer, dims[k], hidden, next(rates), layer_scale[k], scale_stream[k], **factory)

        self.stem = conv_stem(in_chans, dims[0], **factory)
        stages = []
        for k, depth in enumerate(depths):
            down = conv_down(dims[k - 1], dims[k], **factory) if k else None
            stages.append(Stage(down, [create_block(k) for _ in range(depth)]))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        self.head = ProjectedHead(dims[-1], head_dim, num_classes, global_pool, drop_rate, **factory)
        self._describe(in_chans, num_classes, dims)
        self.head_hidden_size = head_dim
        init_maps_(self)


_PUBLISHED = (
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d+)\.blocks\.", lambda m: f"stages.{int(m[1]) // 2}.blocks."),
    (r"^layers\.(\d+)\.(?=[01]\.)", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample."),
    (r"\.cpe1\.", ".place."),
    (r"\.cpe2\.", ".mlp_place."),
    (r"(\.blocks\.\d+)\.norm1\.", r"\1.norm."),
    (r"(\.blocks\.\d+)\.norm2\.", r"\1.mlp_norm."),
    (r"\.token_mixer\.", ".mixer."),
    (r"\.layer_scale1\.", ".scale."),
    (r"\.layer_scale2\.", ".mlp_scale."),
    (r"\.rpb\.0$", ".bias_table"),
    (r"^classifier\.4\.", "head.fc."),
    (r"^classifier\.", "head.project."),
)


def published_names(
    state_dict: dict[str, Any], model: AttentivePyramid, global_table: str, dropped: str
) -> dict[str, Tensor]:
    """Weights under our names, from ours or the published ones; tables of other grids are resampled.

    Args:
        state_dict: Weights, wrapped or not.
        model: The model that they are for.
        global_table: Published name of the last stage's table of pairs.
        dropped: Pattern of published names that hold nothing of their own.
    """
    state = unwrapped(state_dict)
    if any(name.startswith("layers.") for name in state):
        renamed = {}
        for name, tensor in state.items():
            if re.search(dropped, name) or name.endswith(".rope.angle"):
                continue
            if name.endswith(global_table):
                name = name.removesuffix(global_table) + "global_table"
            for pattern, replacement in _PUBLISHED:
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor
        state = renamed
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own or tensor.shape == own[name].shape:
            continue
        if tensor.numel() == own[name].numel():
            state[name] = tensor.reshape(own[name].shape)
        elif name.endswith("global_table"):
            cells = tensor.flatten(0, -3)
            side = round(cells.shape[-1] ** 0.5)
            state[name] = resampled_table(cells, side, side, *model.table_grid, model.table_as_image)
    return state
