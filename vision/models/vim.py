"""Vim: tokens read by two selective scans from both ends; and LBVim: by one scan that also looks back locally.

    block: x + drop_path(mixer(RMSNorm(x)))
    Vim:   [u | z] = in_proj(x);  y = S6_f(u) + flip(S6_b(flip(u)));  out_proj(y silu(z) / 2);  class token inside
    LBVim: one S6 with a backward scan inside segments, the sequence read backwards by every second block; mean pooling

S6 is a causal convolution, silu, data-dependent dt, B and C, and the scan. Positions are learned.
Source: Zhu et al. (2024), "Vision Mamba", algorithm 1; Zhang et al. (2025), "LBMamba", section 3.

    name                    width  depth  parameters
    vim_tiny_patch16_224      192     24   7,148,008
    vim_small_patch16_224     384     24  25,796,584
    vim_base_patch16_224      768     24  97,598,440
    lbvim_tiny_patch16_224    192     24   6,419,560
    lbvim_300_patch16_224     300     24  14,897,200
    lbvim_small_patch16_224   384     24  23,897,320
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model, register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ...kernels import VimWeights, vim_rows
from ...ssmcore.init import a_log_init, dt_bias_init
from ..scans import at_least_float32, hooked, raw_steps, scans_are_plain, selective_mix, short_conv
from .settings import create_tokens, token_cfg
from .token_model import Block, TokenModel, fitted, unwrapped


@register_notrace_module  # a trace would call the parts of what eager code makes in one call, and round otherwise
class VimMixer(nn.Module):
    """Selective scan over a sequence from one or both ends, with one input and one output projection.

    Args:
        d_model: Width of the stream.
        d_state: States per inner channel.
        d_conv: Width of the short causal convolution.
        expand: Inner width over `d_model`.
        bidirectional: Scan from both ends, each with its own weights (names with `_b`).
        window: Segment of the local backward scan; None for none, 0 chooses 4, 8 or 16 by the length.
        reverse: Read the sequence from its end.
        divide: Halve the sum of two directions.
        n_residual: Branches that add to the stream; the output map starts smaller by its square root.
        dt_min: Shortest initial step.
        dt_max: Longest one.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    own_init = True
    __constants__ = ("bidirectional", "local", "reverse")  # TorchScript compiles only the branches taken

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        bidirectional: bool = True,
        window: int | None = None,
        reverse: bool = False,
        divide: bool = True,
        n_residual: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # Rounded to 16 bits, rates near each other would become equal.
        wide: dict[str, Any] = {"device": device, "dtype": at_least_float32(dtype)}
        self.d_inner = expand * d_model
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16)
        self.bidirectional = bidirectional
        self.local = window is not None
        self.window = window or 0
        self.reverse = reverse
        self.scale = 0.5 if bidirectional and divide else 1.0
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False, **factory)
        nn.init.trunc_normal_(self.in_proj.weight, std=0.02)
        for end in ("", "_b") if bidirectional else ("",):
            conv = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, **factory)
            x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
            nn.init.trunc_normal_(x_proj.weight, std=0.02)
            dt_proj = nn.Linear(self.dt_rank, self.d_inner, **factory)
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            with torch.no_grad():
                dt_proj.bias.copy_(dt_bias_init(self.d_inner, dt_min, dt_max, **factory))
            self.add_module(f"conv1d{end}", conv)
            self.add_module(f"x_proj{end}", x_proj)
            self.add_module(f"dt_proj{end}", dt_proj)
            A_log = nn.Parameter(a_log_init(self.d_inner, d_state, **wide))
            self.register_parameter("A_b_log" if end else "A_log", A_log)
            self.register_parameter(f"D{end}", nn.Parameter(torch.ones(self.d_inner, **wide)))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, **factory)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(n_residual)

    if TYPE_CHECKING:
        conv1d: nn.Conv1d
        x_proj: nn.Linear
        dt_proj: nn.Linear
        A_log: Tensor
        D: Tensor
        conv1d_b: nn.Conv1d
        x_proj_b: nn.Linear
        dt_proj_b: nn.Linear
        A_b_log: Tensor
        D_b: Tensor

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("A_log", "D", "dt_proj.bias", "A_b_log", "D_b", "dt_proj_b.bias")

    def forward(self, x: Tensor) -> Tensor:
        """Mix (b, l, d_model)."""
        if self.reverse:
            x = x.flip(1)
        if not torch.jit.is_scripting():
            y = self.joined(x)
            if y is not None:
                return y.flip(1) if self.reverse else y
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if self.bidirectional:
            y = self._both_ends(u)
        else:
            y = self._one_end(u)
        y = self.out_proj((y * F.silu(z)).to(x.dtype)) * self.scale
        return y.flip(1) if self.reverse else y

    @torch.jit.ignore
    def joined(self, x: Tensor, norm: nn.RMSNorm | None = None) -> Tensor | None:
        """The mixer's output, where nobody looks at the parts and one call has them all.

        Args:
            x: (b, l, d_model).
            norm: Norm of `x` before the first projection, one of the parts.

        Returns:
            (b, l, d_model), or None where the parts are to be called.
        """
        if not self.bidirectional or not isinstance(x, Tensor) or x.device.type != "cpu" or scans_are_plain():
            return None
        parts: Any = self._modules
        if any(type(parts[name]) is not kind or hooked(parts[name]) for name, kind in _PARTS.items()):
            return None
        if any(parts[name].bias is not None for name in ("in_proj", "x_proj", "x_proj_b", "out_proj")):
            return None
        sides = []
        for end in ("", "_b"):
            conv, x_proj, dt_proj = (parts[name + end] for name in ("conv1d", "x_proj", "dt_proj"))
            A_log, D = (self.get_parameter(name) for name in (f"A{end}_log", f"D{end}"))
            weights = conv.weight.flatten(1), conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D
            sides.append(VimWeights(*weights))
        out_proj = self.out_proj.weight
        maps = self.in_proj.weight, out_proj if self.scale == 1 else out_proj * self.scale
        if norm is None:
            return vim_rows(x, *maps, *sides)
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        return vim_rows(x, *maps, *sides, norm=norm.weight, eps=eps)

    def _one_end(self, u: Tensor) -> Tensor:
        u = short_conv(u, self.conv1d.weight, self.conv1d.bias, False)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        window = segment(u, self.window) if self.local else 0
        dt = raw_steps(dt, self.dt_proj.weight, self.dt_proj.bias)
        return selective_mix(u, dt, None, self.A_log, B, C, self.D, window)

    def _both_ends(self, u: Tensor) -> Tensor:
        """One call for both directions, side by side as two groups of channels."""
        weight = torch.cat([self.conv1d.weight, self.conv1d_b.weight])
        bias_f, bias_b = self.conv1d.bias, self.conv1d_b.bias
        assert bias_f is not None  # for TorchScript
        assert bias_b is not None
        u = short_conv(torch.cat([u, u.flip(1)], dim=-1), weight, torch.cat([bias_f, bias_b]), False)
        forward, backward = u.chunk(2, dim=-1)
        dt_f, B_f, C_f = self.x_proj(forward).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt_b, B_b, C_b = self.x_proj_b(backward).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        # One product with a block diagonal matrix instead of two and their concatenation.
        maps = torch.block_diag(self.dt_proj.weight, self.dt_proj_b.weight)
        bias = torch.cat([self.dt_proj.bias, self.dt_proj_b.bias])
        y = selective_mix(
            u,
            raw_steps(torch.cat([dt_f, dt_b], dim=-1), maps, bias),
            None,
            torch.cat([self.A_log, self.A_b_log]),
            torch.stack([B_f, B_b], dim=2),
            torch.stack([C_f, C_b], dim=2),
            torch.cat([self.D, self.D_b]),
            0,
        )
        left, right = y.chunk(2, dim=-1)
        return left + right.flip(1)


_PARTS = {
    f"{name}{end}": kind
    for end in ("", "_b")
    for name, kind in (("conv1d", nn.Conv1d), ("x_proj", nn.Linear), ("dt_proj", nn.Linear))
} | {"in_proj": nn.Linear, "out_proj": nn.Linear}


class VimBlock(Block):
    """A block of a norm and a `VimMixer` without an MLP, on a CPU by one call."""

    def forward(self, x: Tensor) -> Tensor:
        """Pass the stream through the block."""
        if not torch.jit.is_scripting():
            y = self.joined(x)
            if y is not None:
                return x + self.drop_path(self.scale(y))
        return x + self.drop_path(self.scale(self.mixer(self.norm(x))))

    @torch.jit.ignore
    def joined(self, x: Tensor) -> Tensor | None:
        """The mixer's output, where nobody looks at the norm or the mixer; else None."""
        norm, mixer = self.norm, self.mixer
        if torch.compiler.is_compiling() or torch.nn.modules.module._has_any_global_hook():
            return None
        if type(norm) is not nn.RMSNorm or type(mixer) is not VimMixer or hooked(norm) or hooked(mixer):
            return None
        if norm.weight is None:
            return None
        return None if mixer.reverse else mixer.joined(x, norm)


@register_notrace_function
def segment(x: Tensor, window: int) -> int:
    """The window itself, or for 0 the published one: 4, 8 or 16 positions for l <= 128, <= 256, or more."""
    if window > 0:
        return window
    return 4 if x.shape[1] <= 128 else 8 if x.shape[1] <= 256 else 16


class Vim(TokenModel):
    """Vim and LBVim.

    Args:
        img_size: Height and width of the images, pixels.
        patch_size: Side of a patch.
        embed_dim: Width of the stream.
        depth: Number of blocks.
        d_state: States per inner channel.
        lbmamba: Scan from one end with a local backward scan, alternating the end (LBVim).
        segment: Segment of that scan; 0 is 4, 8 or 16 by the number of tokens. It changes the function: keep it when
            the image size changes.
        divide: Halve the sum of the two directions.
        class_token: "middle", "head", "double" or "none"; None is "middle", and "none" for LBVim.
        global_pool: "token", "avg" or ""; None follows `class_token`.
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
        d_state: int = 16,
        lbmamba: bool = False,
        segment: int = 0,
        divide: bool = True,
        class_token: Any = None,
        global_pool: Any = None,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        class_token = class_token or ("none" if lbmamba else "middle")
        if global_pool is None:
            global_pool = "avg" if class_token == "none" else "token"

        def create_block(k: int, rate: float) -> nn.Module:
            mixer = VimMixer(
                embed_dim,
                d_state=d_state,
                bidirectional=not lbmamba,
                window=segment if lbmamba else None,
                reverse=lbmamba and k % 2 == 1,
                divide=divide,
                n_residual=depth,
                **factory,
            )
            return VimBlock(nn.RMSNorm(embed_dim, eps=1e-5, **factory), mixer, drop_path=rate)

        super().__init__(
            create_block,
            nn.RMSNorm(embed_dim, eps=1e-5, **factory),
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            class_token=class_token,
            global_pool=global_pool,
            drop_path_rate=drop_path_rate,
            **factory,
            **options,
        )
        fan_in = self.patch_embed.proj.weight[0].numel()
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Vim) -> dict[str, Tensor]:
    """Weights under our names, from ours or the published ones (`layers.k.mixer.*`, `norm_f`), sizes fitted."""
    state = {}
    for name, tensor in unwrapped(state_dict).items():
        name = re.sub(r"^layers\.", "blocks.", name)
        state[re.sub(r"^norm_f\.", "norm.", name)] = tensor
    return fitted(state, model)


_create = partial(create_tokens, Vim, checkpoint_filter_fn)


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": token_cfg(paper)
        for name, paper in {
            "vim_tiny_patch16_224": "arXiv:2401.09417",
            "vim_small_patch16_224": "arXiv:2401.09417",
            "vim_base_patch16_224": "arXiv:2401.09417",
            "lbvim_tiny_patch16_224": "",
            "lbvim_300_patch16_224": "",
            "lbvim_small_patch16_224": "",
        }.items()
    }
)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """192 wide, 24 blocks."""
    return _create("vim_tiny_patch16_224", pretrained, **{"embed_dim": 192, **kwargs})


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """384 wide, 24 blocks."""
    return _create("vim_small_patch16_224", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """768 wide, 24 blocks."""
    return _create("vim_base_patch16_224", pretrained, **{"embed_dim": 768, **kwargs})


@register_model
def lbvim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """192 wide, 24 blocks, locally bidirectional."""
    return _create("lbvim_tiny_patch16_224", pretrained, **{"embed_dim": 192, "lbmamba": True, **kwargs})


@register_model
def lbvim_300_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """300 wide, 24 blocks, locally bidirectional."""
    return _create("lbvim_300_patch16_224", pretrained, **{"embed_dim": 300, "lbmamba": True, **kwargs})


@register_model
def lbvim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """384 wide, 24 blocks, locally bidirectional."""
    return _create("lbvim_small_patch16_224", pretrained, **{"embed_dim": 384, "lbmamba": True, **kwargs})
