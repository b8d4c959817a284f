"""ViM2: a pyramid that mixes cells and channels by selective scans, each fed a weighted sum of all earlier outputs.

    inside a stage, t_0 = c_0 = x:
    t_k = drop_path(tokens(LN(sum_{i<k} a_ki t_i + b_ki c_i)))       four scans of the cells, convolution and gate
    c_k = drop_path(channels(LN(sum_{i<=k} p_ki t_i + sum_{i<k} q_ki c_i)))    scans of a cell's channels, both ends
    out = sum of all t_i and c_i, weighted too

Weights start at 1, those of c_0 at 0, so that a stage starts as a residual network. Stem and the steps between stages
are strided convolutions with norms. Channels are scanned cell by cell, with `channel_width` features for each, so that
images of any size are taken; the published form has inputs from all cells of a fixed grid.
Source: Behrouz, Santacatterina & Zabih (2024), MambaMixer, section 3. No code was released; the sizes are our choice.

    name         C    depths    parameters
    vim2_tiny    96   2 2 5 2   20,095,760
    vim2_small   96   2 2 24 2  42,839,748
    vim2_base    128  2 2 24 2  73,647,940
"""

# No postponed annotations here: TorchScript reads those of the functions that it leaves alone.

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import drop_path_rates, init_linear_
from .pyramid import ChannelNorm, Head, Pyramid, check_per_stage
from .settings import create_pyramid, pyramid_cfg
from .token_model import unwrapped
from .vim import VimMixer
from .vmamba import SS2D, ConvDown, ConvStem


class ChannelScan(nn.Module):
    """Selective scans along the channels of each cell of (b, i, j, d), from both ends.

    Args:
        width: Features that a channel is lifted to.
        d_state: States per inner feature.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    own_init = True

    def __init__(
        self,
        width: int = 4,
        d_state: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lift = nn.Linear(1, width, **factory)
        self.scan = VimMixer(width, d_state=d_state, **factory)
        self.drop = nn.Linear(width, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (b, i, j, d)."""
        each = self.lift(x.flatten(0, 2)[..., None])  # (b i j, d, width)
        return self.drop(self.scan(each)).view(x.shape)


class WeightedSum(nn.Module):
    """Sum of tensors of one shape with learned weights, at first 1, and 0 for the one numbered `without`."""

    def __init__(
        self,
        count: int,
        without: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        weights = torch.ones(count, device=device, dtype=dtype)
        weights[without] = 0
        self.weights = nn.Parameter(weights)

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("weights",)

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Weigh and add."""
        total = parts[0] * self.weights[0]
        for k in range(1, len(parts)):
            total = total + parts[k] * self.weights[k]
        return total


class MixerBlock(nn.Module):
    """Block k of a stage, from 1: all earlier outputs to the next output of either mixer."""

    def __init__(
        self,
        k: int,
        tokens: nn.Module,
        channels: nn.Module,
        dim: int,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.to_tokens = WeightedSum(2 * k, k, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        self.tokens = tokens
        self.to_channels = WeightedSum(2 * k + 1, k + 1, **factory)
        self.channel_norm = nn.LayerNorm(dim, **factory)
        self.channels = channels
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, tokens: list[Tensor], channels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(b, i, j, d) each to the same."""
        t = self.drop_path(self.tokens(self.norm(self.to_tokens(tokens + channels))))
        seen = tokens + [t] + channels  # noqa: RUF005 TorchScript has no unpacking
        c = self.drop_path(self.channels(self.channel_norm(self.to_channels(seen))))
        return t, c


class MixerStage(nn.Module):
    """A stage whose blocks see all its earlier outputs.

    Args:
        downsample: Module, or None.
        blocks: `MixerBlock`s numbered from 1.
        merge: Weighs all outputs.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module], merge: WeightedSum) -> None:
        super().__init__()
        self.downsample = downsample if downsample is not None else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.merge = merge
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the stage's own size."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        tokens, channels = [x], [x]
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                t, c = checkpoint(block, tokens, channels)
            else:
                t, c = block(tokens, channels)
            # New lists: a block that is computed again must see what it saw before. TorchScript has no unpacking.
            tokens = tokens + [t]  # noqa: RUF005
            channels = channels + [c]  # noqa: RUF005
        return self.merge(tokens + channels).permute(0, 3, 1, 2)


class ViM2(Pyramid):
    """ViM2.

    Args:
        in_chans: Channels of an image.
        num_classes: Width of the logits; 0 leaves the pooled features.
        global_pool: "avg" or "" (none).
        dim: Channels of the first stage; each further one has twice as many.
        depths: Blocks of each stage.
        d_state: States per inner channel of the scans of cells.
        ssm_ratio: Their inner width over the channels.
        channel_width: Features of a channel in the scans of channels.
        channel_state: States per inner feature there.
        drop_rate: Dropout before the head.
        drop_path_rate: Rate of the last block; the others' grow up to it.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if `depths` has not four entries.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 5, 2),
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        channel_width: int = 4,
        channel_state: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_per_stage("depths", depths, 4)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [dim * 2**k for k in range(4)]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))

        def create_block(k: int, width: int) -> nn.Module:
            tokens = SS2D(width, d_state=d_state, ratio=ssm_ratio, gated=True, conv_bias=True, **factory)
            channels = ChannelScan(channel_width, channel_state, **factory)
            return MixerBlock(k, tokens, channels, width, next(rates), **factory)

        self.stem = ConvStem(in_chans, dim, False, **factory)
        stages = []
        for k, (width, depth) in enumerate(zip(dims, depths, strict=True)):
            down = ConvDown(width // 2, **factory) if k else None
            blocks = [create_block(number, width) for number in range(1, depth + 1)]
            stages.append(MixerStage(down, blocks, WeightedSum(2 * depth + 2, depth + 1, **factory)))
        self.stages = nn.Sequential(*stages)
        self.norm = ChannelNorm(dims[-1], **factory)
        self.head = Head(dims[-1], num_classes, global_pool, drop_rate, **factory)
        self._describe(in_chans, num_classes, dims)
        init_linear_(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of stem, blocks (coarse: stages) and head for layer-wise rates."""
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"].insert(2, (r"^stages\.(\d+)\.merge", (99999,)))
        return groups


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ViM2) -> dict[str, Tensor]:
    """Weights under our names out of their wrapping; there are no published ones."""
    return unwrapped(state_dict)


_create = partial(create_pyramid, ViM2, checkpoint_filter_fn)


default_cfgs = generate_default_cfgs(
    {
        f"vim2_{size}.untrained": pyramid_cfg("arXiv:2403.19888", "stem.conv1", "head.fc")
        for size in ("tiny", "small", "base")
    }
)


@register_model
def vim2_tiny(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """96 channels, depths 2 2 5 2."""
    return _create("vim2_tiny", pretrained, **kwargs)


@register_model
def vim2_small(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """96 channels, depths 2 2 24 2."""
    return _create("vim2_small", pretrained, **{"depths": (2, 2, 24, 2), **kwargs})


@register_model
def vim2_base(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """128 channels, depths 2 2 24 2."""
    return _create("vim2_base", pretrained, **{"dim": 128, "depths": (2, 2, 24, 2), **kwargs})
