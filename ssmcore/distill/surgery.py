"""From attention to state-space models: taking over an attention's maps, whole or head by head.

Transplant: Bick, Li, Xing, Kolter & Gu (2024), "Transformers to SSMs". Keeping the heads that retrieve: Bick, Xing & Gu
(2025), "Understanding the Skill Gap in Recurrent Language Models" (Gather-and-Aggregate heads).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..mixers import Attention, Bidirectional, DiscreteMamba2
from ..parallel import DoubleMixer


class HybridAttention(DoubleMixer):
    """Some heads of an attention, beside a state-space model in place of the others; their outputs add up.

    Args:
        attention: Where both come from; it is copied.
        kept: Heads that stay attention, at least one and not all.
        bias: See `replace_attention`.

    Attributes:
        kept: Heads that are attention, in order.
        replaced: The others, in the order of the heads of the state-space model.
    """

    def __init__(self, attention: Attention, kept: Sequence[int], *, bias: bool = True) -> None:
        chosen = set(kept)
        rest = [head for head in range(attention.nheads) if head not in chosen]
        stays, others = select_heads(attention, sorted(chosen)), select_heads(attention, rest)
        if others.out_proj.bias is not None:
            others.out_proj.register_parameter("bias", None)  # the heads that stay add it
        super().__init__(attention.d_model, stays, state_space_of(others, bias=bias))
        self.kept, self.replaced = tuple(sorted(chosen)), tuple(rest)


def attention_layers(model: nn.Module) -> dict[str, Attention]:
    """All `Attention` modules of a model by name, in the order of `named_modules`."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Attention)}


def convert(model: nn.Module, keep: Mapping[str, Sequence[int]] | None = None, *, bias: bool = True) -> nn.Module:
    """A student: a copy of the model whose attention heads are state-space models with their maps.

    Args:
        model: Anything with `Attention` modules: a `Stack`, a `SequenceModel`, a model of DNA, a token model of images.
        keep: Heads that stay attention, by the name of the layer as in `attention_layers`; a layer that is not named
            keeps none, and one that keeps all is left as it is.
        bias: Give the state-space models biases in their projections, so that decays can start at 1.

    Returns:
        The copy; its other weights are those of the model.

    Raises:
        TypeError: if heads are no sequence of integers.
        ValueError: if there is no attention, a name or head does not exist, or an attention has a convolution or an MLP
            slice.
    """
    found = attention_layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention to replace (`omnissm.ssmcore.Attention` modules).")
    keep = keep or {}
    for name, heads in keep.items():
        if name not in found:
            raise ValueError(f"there is no attention {name!r}; the model has {', '.join(found)}.")
        if not isinstance(heads, Sequence) or not all(isinstance(head, int) for head in heads):
            raise TypeError(f"`keep` must name heads of {name!r} such as [0, 2], got {heads!r}.")
        wrong = [head for head in heads if not 0 <= head < found[name].nheads]
        if wrong:
            raise ValueError(f"{name!r} has heads 0 to {found[name].nheads - 1}, got {wrong[0]}.")
    student = copy.deepcopy(model)
    for name, attention in attention_layers(student).items():
        replaced = replace_attention(attention, keep.get(name, ()), bias=bias)
        parent, _, leaf = name.rpartition(".")
        if not name:
            return replaced
        setattr(student.get_submodule(parent), leaf, replaced)
    return student


def replace_attention(attention: Attention, keep: Sequence[int] = (), *, bias: bool = True) -> nn.Module:
    """The mixer that takes the place of one attention.

    Args:
        attention: Without convolution and MLP slice.
        keep: Heads that stay attention.
        bias: Give the state-space model biases in its projections.

    Returns:
        `DiscreteMamba2` (`Bidirectional` of two if the attention sees both directions), or `HybridAttention`; the
        attention itself if all heads are kept.

    Raises:
        ValueError: if the attention has a convolution or an MLP slice.
    """
    if len(set(keep)) == attention.nheads:
        return attention
    return HybridAttention(attention, keep, bias=bias) if keep else state_space_of(attention, bias=bias)


@torch.no_grad()
def select_heads(attention: Attention, heads: Sequence[int]) -> Attention:
    """An attention of some heads, whose output is their share of the output.

    Args:
        attention: Without convolution and MLP slice; it is left as it is. Keys and values that heads share are copied.
        heads: Which heads, in order.

    Raises:
        ValueError: if the attention has a convolution or an MLP slice.
    """
    _require_plain(attention)
    width, weight = attention.headdim, attention.in_proj.weight
    part = Attention(
        attention.d_model,
        nheads=len(heads),
        headdim=width,
        causal=attention.causal,
        window=None
        if attention.window == (None, None)
        else [-1 if side is None else side for side in attention.window],
        rotary_dim=attention.rotary_dim,
        rotary_base=attention.rotary_base,
        rotation=attention.rotation,
        qkv_bias=attention.in_proj.bias is not None,
        out_bias=attention.out_proj.bias is not None,
        scale=attention.scale,
        device=weight.device,
        dtype=weight.dtype,
    ).train(attention.training)
    query = torch.tensor(list(heads), device=weight.device)
    shared = query // (attention.nheads // attention.kv_heads)
    places = [query, attention.nheads + shared, attention.nheads + attention.kv_heads + shared]
    rows = (torch.cat(places)[:, None] * width + torch.arange(width, device=weight.device)).flatten()
    part.in_proj.weight.copy_(weight[rows])
    if attention.in_proj.bias is not None:
        part.in_proj.bias.copy_(attention.in_proj.bias[rows])
    columns = (query[:, None] * width + torch.arange(width, device=weight.device)).flatten()
    part.out_proj.weight.copy_(attention.out_proj.weight[:, columns])
    if attention.out_proj.bias is not None:
        part.out_proj.bias.copy_(attention.out_proj.bias)
    return part


def state_space_of(attention: Attention, *, bias: bool = True) -> nn.Module:
    """A state-space model with the maps of an attention, see `transplant`.

    Args:
        attention: Without convolution and MLP slice.
        bias: Give it biases in its projections.

    Returns:
        `DiscreteMamba2` with as many heads and a state as wide as the keys; `Bidirectional` of two of them if the
        attention sees both directions; a position itself then counts twice until training sees to it.
    """
    _require_plain(attention)
    heads, width = attention.nheads, attention.headdim
    options: dict[str, Any] = {
        # Half a channel more than needed: rounding must not take one away.
        "expand": (heads * width + 0.5) / attention.d_model,
        "nheads": heads,
        "d_state": width,
        "bias": bias,
    }
    factory: dict[str, Any] = {"device": attention.in_proj.weight.device, "dtype": attention.in_proj.weight.dtype}
    if attention.causal:
        student = DiscreteMamba2(attention.d_model, **options, **factory)
        transplant(attention, student)
        return student.train(attention.training)
    pair = Bidirectional(attention.d_model, mixer="discrete_mamba2", mixer_options=options, **factory)
    ahead: Any = pair.ahead
    back: Any = pair.back
    transplant(attention, ahead)
    transplant(attention, back)
    if back.out_proj.bias is not None:
        nn.init.zeros_(back.out_proj.bias)  # the other direction adds it
    return pair.train(attention.training)


@torch.no_grad()
def transplant(attention: Attention, student: DiscreteMamba2) -> None:
    """Give a discrete Mamba-2 the maps of an attention: values as x, keys as B, scaled queries as C, and out_proj.

    The student starts as linear attention: its convolution passes inputs on, its gate is open and D is 0. Decays start
    at 1 where in_proj has a bias, else at 1/2. Rotations of positions are left out.

    Args:
        attention: Without convolution and MLP slice.
        student: With as many heads, as wide, and `d_state` the width of the keys; it is changed in place.

    Raises:
        ValueError: if sizes do not fit; the message names them.
    """
    heads, width = attention.nheads, attention.headdim
    wanted = {"d_model": attention.d_model, "nheads": heads, "headdim": width, "d_state": width, "ngroups": heads}
    for name, size in wanted.items():
        if getattr(student, name) != size:
            raise ValueError(f"the student must have {name}={size} as the attention has, got {getattr(student, name)}.")
    _require_plain(attention)
    for name in ("in_proj", "out_proj"):
        if getattr(attention, name).bias is not None and getattr(student, name).bias is None:
            raise ValueError(f"the attention has a bias in {name}; build the student with bias=True.")
    student.attention_init_()
    counts = [heads, attention.kv_heads, attention.kv_heads]

    def maps(tensor: Tensor) -> Tensor:
        """Rows of x, B and C from those of q, k and v."""
        q, k, v = tensor.unflatten(0, (-1, width)).split(counts)
        k, v = (part.repeat_interleave(heads // attention.kv_heads, dim=0) for part in (k, v))
        return torch.cat([v, k, q * attention.scale]).flatten(0, 1)

    rows = student.splits[0]
    student.in_proj.weight[:rows] = maps(attention.in_proj.weight)
    student.in_proj.weight[-heads:] = 0
    if student.in_proj.bias is not None:
        bias = attention.in_proj.bias
        student.in_proj.bias[:rows] = 0 if bias is None else maps(bias)
        student.in_proj.bias[-heads:] = -30.0  # softplus(-30) = 1e-13
    student.out_proj.weight.copy_(attention.out_proj.weight)
    if student.out_proj.bias is not None:
        bias = attention.out_proj.bias
        student.out_proj.bias[:] = 0 if bias is None else bias


def _require_plain(attention: Attention) -> None:
    if attention.conv1d is not None or attention.mlp_dim:
        raise ValueError("expected an attention without convolution and MLP slice, got one with d_conv or mlp_dim.")


__all__ = [
    "HybridAttention",
    "attention_layers",
    "convert",
    "replace_attention",
    "select_heads",
    "state_space_of",
    "transplant",
]
