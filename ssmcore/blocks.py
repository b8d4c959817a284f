"""What stands around mixers: norm, gated MLP, residual blocks and stacks of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .init import residual_init_
from .mixers import create_mixer

NormPosition = Literal["pre", "post"]
Norm = Literal["rms", "layer"]

LETTERS: Mapping[str, str] = {"c": "chimera2d"}


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in float32, result in x's dtype.

    Args:
        d_model: Size of the last dimension.
        eps: Added to the mean square.
        device: Where to create the weight.
        dtype: Its dtype.

    Source: Zhang & Sennrich (2019), equation (4).
    """

    def __init__(
        self,
        d_model: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., d_model)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"{self.weight.numel()}, eps={self.eps}"


class GatedMLP(nn.Module):
    """value, gate = fc1(x); fc2(value * silu(gate)).

    Args:
        d_model: Width of input and output.
        hidden: Inner width; None: 8 d_model / 3 rounded up to a multiple of 128.
        device: Where to create the parameters.
        dtype: Their dtype.

    Source: Shazeer (2020), section 2, SwiGLU.
    """

    def __init__(
        self,
        d_model: int,
        *,
        hidden: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or 128 * -(-8 * d_model // (3 * 128))
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, d_model, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to itself."""
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))


class Residual(nn.Module):
    """A mixer, and an MLP if there is one, around a residual stream.

        pre:   x = x + mixer(norm(x));   x = x + mlp(mlp_norm(x))
        post:  x = norm(x + mixer(x));   x = mlp_norm(x + mlp(x))

    Args:
        d_model: Width of the stream.
        mixer: Any module whose first argument is the stream; further ones are passed through.
        mlp: Module on the stream, or None.
        norm: "rms" or "layer".
        norm_position: "pre" or "post".
        eps: Of the norms.
        residual_in_fp32: Keep a 16-bit stream in float32: many layers of 16-bit additions lose small updates.
        device: Where to create the norms.
        dtype: Their dtype.

    Raises:
        ValueError: if an option has an unknown value.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module,
        mlp: nn.Module | None = None,
        *,
        norm: Norm = "rms",
        norm_position: NormPosition = "pre",
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_position not in ("pre", "post"):
            raise ValueError(f"`norm_position` must be 'pre' or 'post', got {norm_position!r}.")
        self.norm_position = norm_position
        self.residual_in_fp32 = residual_in_fp32
        self.norm = create_norm(norm, d_model, eps=eps, device=device, dtype=dtype)
        self.mixer = mixer
        self.mlp = mlp
        self.mlp_norm = None if mlp is None else create_norm(norm, d_model, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, **mixer_arguments: Any) -> Tensor:
        """Pass the stream (..., d_model) through the block; keyword arguments go to the mixer.

        The stream comes back in float32 (with `residual_in_fp32`), else in the dtype of `x`.
        """
        dtype = torch.promote_types(x.dtype, torch.float32) if self.residual_in_fp32 else x.dtype
        x = x.to(dtype)
        x = self._add(x, self.norm, self.mixer, mixer_arguments)
        if self.mlp is not None and self.mlp_norm is not None:
            x = self._add(x, self.mlp_norm, self.mlp, {})
        return x

    def _add(self, x: Tensor, norm: nn.Module, branch: nn.Module, arguments: dict[str, Any]) -> Tensor:
        # The dtype of the branch's parameters too, where the model was converted as a whole.
        narrow = norm.get_parameter("weight").dtype
        if self.norm_position == "pre":
            return x + branch(norm(x.to(narrow)), **arguments).to(x.dtype)
        return norm(x + branch(x.to(narrow), **arguments).to(x.dtype)).to(x.dtype)


class Stack(nn.Module):
    """Residual blocks and a final norm.

    Layers are given in one of two forms, which may describe the same stack:

        Stack(64, "c2C1")                     letter and count: "c" is chimera2d; upper case adds an MLP
        Stack(64, ["chimera2d", "chimera2d", {"mixer": "chimera2d", "mlp": True}])

    Args:
        d_model: Width of the stream.
        layers: Pattern, or one entry per layer: a name of `MIXERS`, a mapping with "mixer", optionally "mlp" (bool) and
            options of the mixer, or a module.
        mixer_options: Options of every mixer that is built by name.
        mlp_hidden: Inner width of the MLPs, see `GatedMLP`.
        norm: "rms" or "layer".
        norm_position: "pre" or "post", see `Residual`.
        residual_in_fp32: Keep the stream in float32.
        letters: Table of the pattern's letters, lower case, to names.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: if a pattern, letter, name or option is unknown, or there is no layer.
        TypeError: if a mixer has no such option.
    """

    def __init__(
        self,
        d_model: int,
        layers: str | Sequence[str | Mapping[str, Any] | nn.Module],
        *,
        mixer_options: Mapping[str, Any] | None = None,
        mlp_hidden: int | None = None,
        norm: Norm = "rms",
        norm_position: NormPosition = "pre",
        residual_in_fp32: bool = True,
        letters: Mapping[str, str] = LETTERS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        entries = parse_pattern(layers, letters) if isinstance(layers, str) else list(layers)
        if not entries:
            raise ValueError("a Stack needs at least one layer, got none.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        place: dict[str, Any] = {"norm": norm, "norm_position": norm_position, "residual_in_fp32": residual_in_fp32}
        self.checkpoint_every = 0
        self.blocks = nn.ModuleList()
        for entry in entries:
            mlp = None
            if isinstance(entry, nn.Module):
                mixer = entry
            else:
                options = {"mixer": entry} if isinstance(entry, str) else dict(entry)
                if "mixer" not in options:
                    raise ValueError(f"a layer needs the entry 'mixer', got {sorted(options)}.")
                if options.pop("mlp", False):
                    mlp = GatedMLP(d_model, hidden=mlp_hidden, **factory)
                name = options.pop("mixer")
                mixer = create_mixer(name, d_model, **{**factory, **(mixer_options or {}), **options})
            self.blocks.append(Residual(d_model, mixer, mlp, **place, **factory))
        self.norm = nn.Identity() if norm_position == "post" else create_norm(norm, d_model, **factory)
        branches = sum(1 if block.mlp is None else 2 for block in self.blocks)
        for entry, block in zip(entries, self.blocks):
            if not isinstance(entry, nn.Module):  # a module that was handed in keeps its weights
                residual_init_(block, branches)

    @property
    def causal(self) -> bool:
        """Whether every mixer is causal."""
        return all(getattr(block.mixer, "causal", False) for block in self.blocks)

    def set_grad_checkpointing(self, every: int = 1) -> None:
        """Recompute every n-th block in the backward pass instead of keeping its activations; 0 turns it off."""
        if every < 0:
            raise ValueError(f"expected every of at least 0, got {every}.")
        self.checkpoint_every = every

    def forward(self, x: Tensor, **mixer_arguments: Any) -> Tensor:
        """Pass (..., d_model) through all blocks and the final norm; keyword arguments go to every mixer."""
        for index, block in enumerate(self.blocks):
            if self.checkpoint_every and index % self.checkpoint_every == 0 and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, **mixer_arguments)
            else:
                x = block(x, **mixer_arguments)
        return self.norm(x)


def create_norm(norm: str, d_model: int, *, eps: float = 1e-5, **factory: Any) -> nn.Module:
    """Build a norm over the last dimension: "rms" or "layer".

    Raises:
        ValueError: if the name is unknown.
    """
    if norm == "rms":
        return RMSNorm(d_model, eps=eps, **factory)
    if norm == "layer":
        return nn.LayerNorm(d_model, eps=eps, **factory)
    raise ValueError(f"`norm` must be 'rms' or 'layer', got {norm!r}.")


def parse_pattern(pattern: str, letters: Mapping[str, str] = LETTERS) -> list[dict[str, Any]]:
    """Read a pattern such as "c2C1": letter and count, upper case with an MLP.

    Raises:
        ValueError: if the pattern is malformed or a letter is not in the table.

    Notation of Hwang, Wang & Gu (2025), H-Net.
    """
    if not re.fullmatch(r"([A-Za-z]\d+)+", pattern):
        raise ValueError(f"a pattern is letters with counts such as 'c2C1', got {pattern!r}.")
    found: list[dict[str, Any]] = []
    for letter, count in re.findall(r"([A-Za-z])(\d+)", pattern):
        if letter.lower() not in letters:
            raise ValueError(f"unknown letter {letter!r} in pattern {pattern!r}; known: {', '.join(sorted(letters))}.")
        found += [{"mixer": letters[letter.lower()], "mlp": letter.isupper()}] * int(count)
    return found
