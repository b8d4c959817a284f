"""Hydra on images: tokens of patches, row by row, mixed from both ends by a quasiseparable matrix.

    x = patches(image) + positions;   x = x + drop_path(Hydra(LayerNorm(x))) for each block;   head(mean(LayerNorm(x)))

Two mixers stand for one block of a vision transformer, so there is no MLP; with `mlp_ratio` there is one in each block.
Source: Hwang, Lahoti, Dao & Gu (2024), Hydra, section 4 (images); the mixer: `omnissm.ssmcore.Hydra`.

    name                        width  depth  d_state  parameters
    hydra_vit_tiny_patch16_224    192     24       64   7,119,064
    hydra_vit_small_patch16_224   384     24       64  25,025,992
    hydra_vit_base_patch16_224    768     24       64  93,353,896
"""

# No postponed annotations here: TorchScript reads those of the methods that it leaves alone.

import re
from functools import partial
from typing import Any, Literal

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from ...kernels import HydraWeights, hydra_blocks, hydra_rows
from ...ssmcore.mixers import Hydra
from ..layers import init_linear_
from ..scans import LayerNormForProduct, PlainBlocks, gate_norm, hooked, quasiseparable_mix, short_conv
from .settings import token_cfg
from .token_model import Block, Mlp, TokenModel, fitted, unwrapped


@register_notrace_module  # a trace would call the parts of what eager code makes in one call, and round otherwise
class TokenHydra(Hydra):
    """Hydra for whole images: the same function of (b, l, d), in a form that torch.fx and TorchScript read.

    Args:
        d_model: Width of the stream.
        **options: Those of `Hydra`; no learned initial states and no limits of the steps.
    """

    own_init = True

    def __init__(self, d_model: int, **options: Any) -> None:
        super().__init__(d_model, **options)
        self.norm = NormGate(self.norm)  # type: ignore[assignment]
        self.sizes = [self.d_inner, *4 * [self.ngroups * self.d_state]]
        self.chunk = self.chunk_size or 0
        for linear in (self.in_proj, self.out_proj, self.fc_D):
            nn.init.trunc_normal_(linear.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Mix (b, l, d_model)."""
        projected = self.in_proj(x)
        if not torch.jit.is_scripting():
            y = self.joined(projected)
            if y is not None:
                return self.out_proj(y)
        z, mixed, dt_f, dt_b = projected.split(self.splits, dim=-1)
        mixed = short_conv(mixed, self.conv1d.weight, self.conv1d.bias, True)
        u, B_f, C_f, B_b, C_b = mixed.split(self.sizes, dim=-1)
        groups = [self.ngroups, self.d_state]
        maps = [
            B_f.unflatten(-1, groups),
            C_f.unflatten(-1, groups),
            B_b.unflatten(-1, groups),
            C_b.unflatten(-1, groups),
        ]
        heads = u.unflatten(-1, [self.nheads, self.headdim])
        # Rows of one matrix: torch.compile makes a product for each sample of a slice in three dimensions.
        diag = self.fc_D(u.flatten(0, 1)).view(dt_f.shape)
        y = quasiseparable_mix(heads, dt_f, dt_b, self.dt_bias, self.A_log, maps, diag, self.D, self.chunk)
        return self.out_proj(self.norm(y.flatten(2), z))

    @torch.jit.ignore
    def joined(self, projected: Tensor) -> Tensor | None:
        """What the last projection takes, where nobody looks at the parts before and one call has them all."""
        if not isinstance(projected, Tensor) or self.chunk or not _as_built(self, _INNER):
            return None
        conv, of_x = self.conv1d, self.fc_D
        assert conv.bias is not None  # it was built with one
        weights = conv.weight, conv.bias, self.dt_bias, self.A_log, of_x.weight, self.D, self.norm.weight
        return hydra_rows(projected, *weights, d_state=self.d_state, eps=self.norm.eps)


class NormGate(nn.Module):
    """RMSNorm(y) * silu(z), with the weight of another module."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(norm.eps)  # type: ignore[arg-type]

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate (..., d) by (..., d)."""
        return gate_norm(y, z, self.weight, self.eps)


class HydraBlocks(PlainBlocks):
    """Blocks whose mixers are `TokenHydra`, in few launches where the kernels allow it."""

    whole = True

    @torch.jit.ignore
    def joinable(self, x: Tensor) -> bool:
        """Whether the blocks may be computed without calling their modules."""
        if not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return super().joinable(x)
        return not torch.compiler.is_compiling() and self.plain(x)

    @torch.jit.ignore
    def joined(self, x: Tensor) -> Tensor:
        """The blocks one after another, the norms joined with sums or the blocks with each other."""
        blocks: list[Any] = list(self)
        weights = [one for one in map(_weights, blocks) if one is not None]
        if len(weights) == len(blocks):
            first = blocks[0]
            y = hydra_blocks(
                x,
                weights,
                headdim=first.mixer.headdim,
                d_state=first.mixer.d_state,
                eps=first.norm.eps,
                gate_eps=first.mixer.norm.eps,
                scale=partial(_scale, blocks, x),
            )
            if y is not None:
                return y
        if not torch.is_grad_enabled():
            return super().joined(x)
        for block in blocks:
            x = block(x)
        return x


def _scale(blocks: list[Any], x: Tensor, number: int) -> Tensor | None:
    """What the branch of a block is multiplied by in each sample, (b, 1, 1)."""
    drop_path = blocks[number].drop_path
    if not drop_path.training or isinstance(drop_path, nn.Identity):
        return None
    return drop_path(x.new_ones(x.shape[0], 1, 1))


def _weights(block: Any) -> HydraWeights | None:
    """Parameters of a block, None where its parts are not those that it was built with or somebody looks at them."""
    mixer = block._modules["mixer"]
    if type(mixer) is not TokenHydra or hooked(mixer):
        return None
    parts: Any = mixer._modules
    if not _as_built(mixer, _PARTS):
        return None
    in_proj, conv, out_proj, of_x, gate = (parts[name]._parameters for name in _PARTS)
    own: Any = mixer._parameters
    norm = block._modules["norm"]._parameters
    if in_proj.get("bias") is not None or out_proj.get("bias") is not None:
        return None
    found = (
        norm.get("weight"),
        norm.get("bias"),
        in_proj.get("weight"),
        conv.get("weight"),
        conv.get("bias"),
        own.get("dt_bias"),
        own.get("A_log"),
        of_x.get("weight"),
        own.get("D"),
        gate.get("weight"),
        out_proj.get("weight"),
    )
    # Wrappers that shard or parametrize weights take them out of their modules.
    return None if any(one is None for one in found) else HydraWeights(*found)


def _as_built(mixer: Any, kinds: dict[str, type]) -> bool:
    """Whether parts are of the kinds that they were built as, and nobody looks at them."""
    parts = mixer._modules
    return all(type(parts[name]) is kind and not hooked(parts[name]) for name, kind in kinds.items())


_INNER = {"conv1d": nn.Conv1d, "fc_D": nn.Linear, "norm": NormGate}
_PARTS = {"in_proj": nn.Linear, "conv1d": nn.Conv1d, "out_proj": nn.Linear, "fc_D": nn.Linear, "norm": NormGate}


class HydraViT(TokenModel):
    """Hydra on images.

    Args:
        img_size: Height and width of the images, pixels.
        patch_size: Side of a patch.
        embed_dim: Width of the stream.
        depth: Number of blocks.
        d_state: States per channel and direction.
        headdim: Channels of a head.
        mlp_ratio: Inner width of each block's MLP over `embed_dim`; 0 for no MLP.
        pos_embed: "learn" or "none".
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
        depth: int = 24,
        d_state: int = 64,
        headdim: int = 64,
        mlp_ratio: float = 0.0,
        pos_embed: Literal["learn", "none"] = "learn",
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def create_norm() -> nn.Module:
            return LayerNormForProduct(embed_dim, eps=1e-6, **factory)

        def create_block(k: int, rate: float) -> nn.Module:
            mixer = TokenHydra(embed_dim, d_state=d_state, headdim=headdim, **factory)
            if mlp_ratio <= 0:
                return Block(create_norm(), mixer, drop_path=rate)
            mlp = Mlp(embed_dim, int(mlp_ratio * embed_dim), **factory)
            return Block(create_norm(), mixer, create_norm(), mlp, drop_path=rate)

        super().__init__(
            create_block,
            nn.LayerNorm(embed_dim, eps=1e-6, **factory),
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            pos_embed=pos_embed,
            drop_path_rate=drop_path_rate,
            **factory,
            **options,
        )
        if mlp_ratio <= 0:
            self.blocks = HydraBlocks(*self.blocks)
        init_linear_(self)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: HydraViT) -> dict[str, Tensor]:
    """Weights under our names, from ours or from `layers.k.*`; position table and patch filters resampled to size."""
    state = {re.sub(r"^layers\.", "blocks.", name): tensor for name, tensor in unwrapped(state_dict).items()}
    return fitted(state, model)


def _create(name: str, pretrained: bool, **options: Any) -> HydraViT:
    return build_model_with_cfg(
        HydraViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **options,
    )


default_cfgs = generate_default_cfgs(
    {f"hydra_vit_{size}_patch16_224.untrained": token_cfg("arXiv:2407.09941") for size in ("tiny", "small", "base")}
)


@register_model
def hydra_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> HydraViT:
    """192 wide, 24 blocks."""
    return _create("hydra_vit_tiny_patch16_224", pretrained, **{"embed_dim": 192, **kwargs})


@register_model
def hydra_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> HydraViT:
    """384 wide, 24 blocks."""
    return _create("hydra_vit_small_patch16_224", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def hydra_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> HydraViT:
    """768 wide, 24 blocks."""
    return _create("hydra_vit_base_patch16_224", pretrained, **{"embed_dim": 768, **kwargs})
