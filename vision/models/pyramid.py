"""What pyramids share: a stem, four stages at strides 4, 8, 16 and 32, and a head, behind timm's interface.

Subclasses set `stem`, `stages` (a Sequential), `norm` and `head`, and call `_describe` at the end.
"""

# No postponed annotations here: torch.fx writes those of `forward` into its code, and needs types, not their names.

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .token_model import chosen, undecayed


class Stage(nn.Module):
    """A layer that halves the grid, or none, before blocks of one width; maps and blocks (batch, channels, i, j).

    Args:
        downsample: Module, or None.
        blocks: Modules of one width.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample if downsample is not None else nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def mix(self, x: Tensor) -> Tensor:
        """The blocks, one after another: maps (batch, channels, i, j) to such maps."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the stage's own size."""
        return self.mix(self.downsample(x))


class GridStage(Stage):
    """A stage whose blocks work on grids (b, i, j, d)."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the stage's own size."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        return self.mix(x).permute(0, 3, 1, 2)


class Head(nn.Module):
    """Global mean, dropout and a linear map.

    Args:
        in_features: Channels.
        num_classes: Width of the logits; 0 leaves the pooled features.
        global_pool: "avg" or "" (none).
        drop_rate: Dropout before the linear map.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool, device, dtype)

    def reset(
        self,
        num_classes: int,
        global_pool: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """New linear map, and another pooling if given.

        Raises:
            ValueError: if the pooling is unknown, or there is none before a linear map.
        """
        if global_pool is not None:
            if global_pool not in ("", "avg"):
                raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}.")
            self.global_pool = global_pool
        if num_classes > 0:
            if not self.global_pool:
                raise ValueError("a classifier needs global_pool='avg'; use num_classes=0 for maps.")
            self.fc: nn.Module = nn.Linear(self.in_features, num_classes, device=device, dtype=dtype)
            nn.init.trunc_normal_(self.fc.weight, std=0.02)
            nn.init.zeros_(self.fc.bias)
        else:
            self.fc = nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of maps (batch, channels, height, width)."""
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class Pyramid(nn.Module):
    """Base of the pyramids; see the module's text for what subclasses set."""

    if TYPE_CHECKING:  # TorchScript would take annotations that it sees for the modules' types
        stem: nn.Module
        stages: nn.Sequential
        norm: nn.Module
        head: Head
    __jit_unused_properties__ = ("grad_checkpointing",)

    def _describe(self, in_chans: int, num_classes: int, dims: Sequence[int], stem_stride: int = 4) -> None:
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"module": f"stages.{k}", "num_chs": dim, "reduction": stem_stride * 2**k} for k, dim in enumerate(dims)
        ]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        return set(undecayed(self))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of stem, blocks (coarse: stages) and head for layer-wise rates."""
        blocks: list[tuple[str, Any]] = [(r"^stages\.(\d+)", None)]
        if not coarse:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            ]
        return {"stem": r"^stem", "blocks": [*blocks, (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @property
    def grad_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return any(bool(stage.grad_checkpointing) for stage in self.stages)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear map."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New head for another number of classes (0: none), and another pooling if given."""
        self.num_classes = num_classes
        weight = next(self.stem.parameters())
        self.head.reset(num_classes, global_pool, weight.device, weight.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normed maps of the last stage, (batch, channels, height / 32, width / 32)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the features, or what enters the last linear map."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, num_classes) of images (batch, channels, height, width)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen stages, before the next one makes them smaller.

        Args:
            x: Images (batch, channels, height, width).
            indices: Numbers of stages, negative from the end; an integer takes the last so many, None all.
            norm: Apply the final norm to the last stage's map.
            stop_early: Compute no stage after the last chosen one.
            output_fmt: "NCHW".
            intermediates_only: Leave out the final features.

        Returns:
            The final features and the list of maps, or the list alone.

        Raises:
            ValueError: if `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        taken, last = chosen(len(self.stages), indices)
        final = len(self.stages) - 1
        x = self.stem(x)
        found = []
        for k, stage in enumerate(self.stages):
            if stop_early and k > last:
                break
            x = stage(x)
            if k in taken:
                found.append(self.norm(x) if norm and k == final else x)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last chosen one, and if asked norm and head; returns the chosen numbers."""
        taken, last = chosen(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (batch, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm each place by itself."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def check_per_stage(name: str, values: Sequence[Any], count: int) -> None:
    """Check that a setting per stage has as many entries as there are stages.

    Raises:
        ValueError: if it has not.
    """
    if len(values) != count:
        raise ValueError(f"{name} needs one entry for each of {count} stages, got {list(values)}.")
