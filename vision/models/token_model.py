"""What token models share: patches in, equal blocks, a final norm and a head, behind timm's interface.

x = patches(image) (+ positions) (+ class token);   x = block_k(x) for each k;   y = head(pool(norm(x)))
"""

# No postponed annotations here: torch.fx writes those of `forward` into its code, and needs types, not their names.

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models import checkpoint, checkpoint_seq, register_notrace_function
from torch import Tensor, nn

from ..layers import PatchEmbed, drop_path_rates

ClassToken = Literal["none", "head", "middle", "double"]
Pool = Literal["", "avg", "token"]


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) over the last dimension.

    Args:
        dim: Width of input and output.
        hidden: Inner width.
        tanh: The tanh form of GELU.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        tanh: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.act = nn.GELU("tanh" if tanh else "none")
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to itself."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + drop_path(scale(mixer(norm(x)))), and x + drop_path(mlp_scale(mlp(mlp_norm(x)))) if there is an MLP.

    Args:
        norm: Norm of the mixer's input.
        mixer: Maps the stream to itself.
        mlp_norm: Norm of the MLP's input, or None.
        mlp: Module on the stream, or None.
        drop_path: Share of samples whose branch is left out while training.
        scale: Module on the mixer's output, or None.
        mlp_scale: Module on the MLP's output, or None.
    """

    def __init__(
        self,
        norm: nn.Module,
        mixer: nn.Module,
        mlp_norm: nn.Module | None = None,
        mlp: nn.Module | None = None,
        drop_path: float = 0.0,
        scale: nn.Module | None = None,
        mlp_scale: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale if scale is not None else nn.Identity()
        self.mlp_scale = mlp_scale if mlp_scale is not None else nn.Identity()
        self.norm = norm
        self.mixer = mixer
        self.mlp_norm = mlp_norm if mlp_norm is not None else nn.Identity()
        self.mlp = mlp if mlp is not None else nn.Identity()
        self.has_mlp = mlp is not None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Pass the stream through the block."""
        x = x + self.drop_path(self.scale(self.mixer(self.norm(x))))
        if self.has_mlp:
            x = x + self.drop_path(self.mlp_scale(self.mlp(self.mlp_norm(x))))
        return x


class TokenModel(nn.Module):
    """A stack of blocks on the patches of an image, with the methods that timm's models have.

    Args:
        create_block: Called with the block's number and its drop-path rate.
        norm: Norm after the last block.
        img_size: Height and width that the position table is made for, pixels.
        patch_size: Side of a patch.
        patch_stride: Distance of patches; None is `patch_size`.
        in_chans: Channels of an image.
        num_classes: Width of the logits; 0 leaves the pooled features.
        global_pool: "avg" (mean of the patches), "token" (class token) or "" (none).
        embed_dim: Width of the stream.
        depth: Number of blocks.
        class_token: Where it is put: "none", "head" (first), "middle" (position l // 2), or "double" (both ends; their
            mean is pooled).
        pos_embed: "learn" or "none".
        keep_grid: Blocks work on (b, i, j, d) instead of (b, l, d); no class token and no positions then.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the positions.
        drop_path_rate: Rate of the last block; the others' grow up to it.
        dynamic_img_size: Take images of any size; positions are resampled.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if options contradict each other.
    """

    def __init__(
        self,
        create_block: Callable[[int, float], nn.Module],
        norm: nn.Module,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        patch_stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "avg",
        embed_dim: int = 192,
        depth: int = 24,
        class_token: ClassToken = "none",
        pos_embed: Literal["learn", "none"] = "learn",
        keep_grid: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if class_token not in ("none", "head", "middle", "double"):
            raise ValueError(f"class_token must be none, head, middle or double, got {class_token!r}.")
        if pos_embed not in ("learn", "none"):
            raise ValueError(f"pos_embed must be 'learn' or 'none', got {pos_embed!r}.")
        self._factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.class_token = class_token
        self.global_pool = self._checked_pool(global_pool)
        self.keep_grid = keep_grid
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            stride=patch_stride,
            dynamic=dynamic_img_size,
            **self._factory,
        )
        rows, columns = self.patch_embed.grid_size
        extra = {"none": 0, "head": 1, "middle": 1, "double": 2}[class_token]
        self.cls_token = nn.Parameter(torch.zeros(1, extra, embed_dim, **self._factory)) if extra else None
        shape = (1, rows * columns + extra, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(*shape, **self._factory)) if pos_embed == "learn" else None
        for table in (self.cls_token, self.pos_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*(create_block(k, rate) for k, rate in enumerate(rates)))
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{k}", "num_chs": embed_dim, "reduction": reduction} for k in range(depth)
        ]
        self.norm = norm
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._create_head(num_classes)

    def _checked_pool(self, global_pool: str) -> str:
        if global_pool not in ("", "avg", "token"):
            raise ValueError(f"global_pool must be 'avg', 'token' or '', got {global_pool!r}.")
        if global_pool == "token" and self.class_token == "none":
            raise ValueError("global_pool='token' needs a class token, and this model has none; use 'avg'.")
        return global_pool

    def _create_head(self, num_classes: int) -> nn.Module:
        if num_classes <= 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes, **self._factory)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def no_decay_names(self) -> tuple[str, ...]:
        """Own parameters that weight decay must leave alone."""
        return ("pos_embed", "cls_token")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone, those of the blocks included."""
        return set(undecayed(self))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of stem, blocks and head for layer-wise rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear map."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New head for another number of classes (0: none), and another pooling if given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        weight = self.patch_embed.proj.weight
        self._factory = {"device": weight.device, "dtype": weight.dtype}
        self.head = self._create_head(num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """Patches with positions and class token: (batch, channels, height, width) -> (b, l, d) or (b, i, j, d)."""
        x = self.patch_embed(x)
        if not self.keep_grid:
            rows, columns = x.shape[1], x.shape[2]
            x = x.flatten(1, 2)
            if self.cls_token is not None:
                x = insert_tokens(x, self.cls_token, self.class_token)
            if self.pos_embed is not None:
                if self.dynamic_img_size:
                    old_rows, old_columns = self.patch_embed.grid_size
                    x = x + resampled_positions(self.pos_embed, old_rows, old_columns, rows, columns, self.class_token)
                else:
                    x = x + self.pos_embed
        return self.pos_drop(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normed tokens (b, l, d), class tokens among them."""
        x = self.embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        x = self.norm(x)
        return x.flatten(1, 2) if self.keep_grid else x

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (b, l, d) to one vector (b, d), or unchanged for global_pool=''."""
        if self.global_pool == "":
            return x
        if self.class_token == "none":
            return x.mean(dim=1)
        if self.class_token == "double":
            tokens = x[:, 0] + x[:, -1]
            if self.global_pool == "token":
                return tokens / 2
            return (x.sum(dim=1) - tokens) / (x.shape[1] - 2)
        token = x[:, 0] if self.class_token == "head" else x[:, (x.shape[1] - 1) // 2]
        if self.global_pool == "token":
            return token
        return (x.sum(dim=1) - token) / (x.shape[1] - 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the features, or what enters the last linear map."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, num_classes) of images (batch, channels, height, width)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen blocks.

        Args:
            x: Images (batch, channels, height, width).
            indices: Numbers of blocks, negative from the end; an integer takes the last so many, None all.
            return_prefix_tokens: Give (map, class tokens (b, k, d)) for each block.
            norm: Apply the final norm to each.
            stop_early: Compute no block after the last chosen one.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: Leave out the final features.

        Returns:
            The final features and the list of maps, or the list alone.

        Raises:
            ValueError: if `output_fmt` is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}.")
        taken, last = chosen(len(self.blocks), indices)
        size = (x.shape[-2], x.shape[-1])
        x = self.embed(x)
        found = []
        for k, block in enumerate(self.blocks):
            if stop_early and k > last:
                break
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if k in taken:
                found.append(self._as_map(self.norm(x) if norm else x, size, output_fmt, return_prefix_tokens))
        if intermediates_only:
            return found
        x = self.norm(x)
        return (x.flatten(1, 2) if self.keep_grid else x), found

    def _as_map(self, x: Tensor, size: tuple[int, int], output_fmt: str, prefix: bool) -> Any:
        x = x.flatten(1, 2) if self.keep_grid else x
        tokens, x = split_tokens(x, self.class_token)
        if output_fmt == "NCHW":
            x = x.unflatten(1, self.patch_embed.dynamic_feat_size(size)).permute(0, 3, 1, 2).contiguous()
        return (x, tokens) if prefix else x

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last chosen one, and if asked norm and head; returns the chosen numbers."""
        taken, last = chosen(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken


def chosen(count: int, indices: int | list[int] | tuple[int, ...] | None) -> tuple[list[int], int]:
    """Numbers of chosen levels, ascending from zero, and the largest.

    Args:
        count: Number of levels.
        indices: Numbers, negative from the end; an integer takes the last so many, None all.

    Raises:
        ValueError: if there is no such level.
    """
    if indices is None:
        indices = count
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"cannot take the last {indices} of {count} levels.")
        taken = list(range(count - indices, count))
    else:
        taken = [k + count if k < 0 else k for k in indices]
        if not taken or min(taken) < 0 or max(taken) >= count:
            raise ValueError(f"indices {list(indices)} name a level that is not there; there are {count}.")
    return taken, max(taken)


def undecayed(model: nn.Module) -> Iterator[str]:
    """Full names of the parameters that modules declare by `no_decay_names()`."""
    known = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        names = getattr(module, "no_decay_names", None)
        for name in names() if callable(names) else ():
            full = f"{prefix}.{name}" if prefix else name
            if full in known:
                yield full


@register_notrace_function
def insert_tokens(x: Tensor, tokens: Tensor, place: str) -> Tensor:
    """Put class tokens (1, k, d) into (b, l, d): first, in the middle (position l // 2), or one at each end."""
    tokens = tokens.expand(x.shape[0], -1, -1)
    if place == "head":
        return torch.cat([tokens, x], dim=1)
    if place == "double":
        return torch.cat([tokens[:, :1], x, tokens[:, 1:]], dim=1)
    middle = x.shape[1] // 2
    return torch.cat([x[:, :middle], tokens, x[:, middle:]], dim=1)


def split_tokens(x: Tensor, place: str) -> tuple[Tensor, Tensor]:
    """Undo `insert_tokens`: class tokens (b, k, d) and patches (b, l, d)."""
    if place == "none":
        return x[:, :0], x
    if place == "head":
        return x[:, :1], x[:, 1:]
    if place == "double":
        return torch.cat([x[:, :1], x[:, -1:]], dim=1), x[:, 1:-1]
    middle = (x.shape[1] - 1) // 2
    return x[:, middle : middle + 1], torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1)


@register_notrace_function
@torch.jit.ignore
def resampled_positions(
    table: Tensor, old_rows: int, old_columns: int, rows: int, columns: int, class_token: str
) -> Tensor:
    """Position table (1, l, d) of one grid for another one; positions of class tokens stay with them."""
    if (old_rows, old_columns) == (rows, columns):
        return table
    tokens, patches = split_tokens(table, class_token)
    patches = resample_abs_pos_embed(
        patches, new_size=[rows, columns], old_size=[old_rows, old_columns], num_prefix_tokens=0
    )
    return patches if class_token == "none" else insert_tokens(patches, tokens, class_token)


def unwrapped(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, out of its wrapping ("model", "state_dict", ...) and without "module." in names."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def fitted(state: dict[str, Tensor], model: TokenModel) -> dict[str, Tensor]:
    """Weights whose position table and patch filters are resampled to the model's sizes where they differ.

    Raises:
        ValueError: if the table belongs to no square grid.
    """
    table, own_table = state.get("pos_embed"), model.pos_embed
    if table is not None and own_table is not None and table.shape != own_table.shape:
        tokens = {"none": 0, "head": 1, "middle": 1, "double": 2}[model.class_token]
        side = round((table.shape[1] - tokens) ** 0.5)
        if side * side + tokens != table.shape[1]:
            raise ValueError(f"`pos_embed` has {table.shape[1]} positions, no square grid; cannot resample it.")
        state["pos_embed"] = resampled_positions(table, side, side, *model.patch_embed.grid_size, model.class_token)
    weight, own = state.get("patch_embed.proj.weight"), model.patch_embed.proj.weight
    if weight is not None and weight.shape[-2:] != own.shape[-2:]:
        state["patch_embed.proj.weight"] = F.interpolate(
            weight.float(), size=own.shape[-2:], mode="bicubic", antialias=True
        ).to(weight.dtype)
    return state
