"""Weights in 8 bits, and what finding good scales for activations needs: observers, reordering and fake quantisation.

    small = quantize(model);    save_quantized(small, "model.int8.safetensors")
    again = load_quantized(build_model(), "model.int8.safetensors")

Weights are int8 with a scale per output, w = scale q; products are those of the activations' dtype. Reordering and
percentiles of state-space activations: Chiang et al. (2025), "Quamba2".
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from .mixers import DiscreteMamba2, Mamba2

_FORMAT = "omnissm-int8-1"


class QuantizedLinear(nn.Module):
    """A linear layer with int8 weights and one scale per output, for inference.

        y = scale (q x) + bias,    |w - scale q| <= scale / 2,    scale = max |w| / 127 over a row

    Args:
        linear: The layer; it is left as it is.

    The weights of a call are cast to the dtype of `x`, so that memory is saved and not time.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        wide = weight.float()
        scale = wide.abs().amax(1) / 127
        steps = torch.where(scale > 0, scale, 1)[:, None]
        self.register_buffer("q", (wide / steps).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.dtype = weight.dtype

    q: Tensor
    scale: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        # Not scaled afterwards: sums of products with q itself leave the range of float16.
        weight = (self.q * self.scale[:, None]).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    @property
    def weight(self) -> Tensor:
        """The weights that are used, (out_features, in_features), in the dtype they had; made anew for each call."""
        return (self.q.float() * self.scale[:, None]).to(self.dtype)

    def extra_repr(self) -> str:
        """Shown by repr()."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize(model: nn.Module, *, skip: Sequence[str] = ()) -> nn.Module:
    """A copy of a model for inference whose linear layers have int8 weights.

    Args:
        model: Any model.
        skip: Shell patterns of names of layers that stay as they are, such as "*.out_proj". Layers that share their
            weight with another module (a head tied to an embedding) always stay.

    Raises:
        ValueError: if no layer is left.
    """
    names = [name for name in _linear_names(model) if not any(fnmatch(name, pattern) for pattern in skip)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer inside that is left to quantise.")
    return _replaced(model, names)


def save_quantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model from `quantize` to a safetensors file, whole or not at all.

    Raises:
        ValueError: if the model has no int8 weights.
        FileNotFoundError: if the folder does not exist.
    """
    path, names = Path(path), _quantized_names(model)
    if not names:
        raise ValueError(f"{type(model).__name__} has no int8 weights; quantize(model) makes them.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to; make it first.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_model(model, str(temporary), metadata={"format": _FORMAT, "layers": json.dumps(names)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_quantized(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """A copy of a model with the int8 weights of a file.

    Args:
        model: Built as the saved one was, before `quantize`; its weights do not matter.
        path: From `save_quantized`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds something else, or does not fit the model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; save_quantized(model, path) writes them.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}.") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no int8 weights (format {metadata.get('format')!r}, expected {_FORMAT!r}).")
    names = json.loads(metadata.get("layers", "null"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is damaged: its header names no layers; save the weights again.")
    unknown = sorted(set(names) - set(_linear_names(model)))
    if unknown:
        raise ValueError(f"{path} has weights of {unknown[0]}, which the model lacks; build it as the saved one was.")
    loaded = _replaced(model, names)
    try:
        load_model(loaded, str(path))
    except RuntimeError as error:
        reasons = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit {type(model).__name__}: {reasons}") from None
    return loaded


def model_bytes(model: nn.Module) -> int:
    """Memory of all parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


class Range(NamedTuple):
    """Magnitudes of one activation, per channel.

    Attributes:
        maximum: Largest, (c,).
        quantile: Largest over batches of a quantile within each batch, (c,).
    """

    maximum: Tensor
    quantile: Tensor


@contextmanager
def observe(model: nn.Module, *, quantile: float = 0.99999) -> Iterator[dict[str, Range]]:
    """Record the ranges of activations while a model runs on whole sequences.

        with observe(model) as ranges:
            for ids in batches:
                model(ids)

    Args:
        model: Any model.
        quantile: Of the magnitudes, over rows and positions of a batch: the smallest one that at least this share do
            not exceed. Quamba2 takes 0.99999 for x.

    Yields:
        By name: the input of each linear layer ("...in_proj"), and of `mamba2` and `discrete_mamba2` x, B, C and y of
        the recurrence ("...mixer.x").

    Raises:
        ValueError: if the quantile does not lie in (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"`quantile` must lie in (0, 1], got {quantile}.")
    found: dict[str, Range] = {}

    def record(name: str, values: Tensor) -> None:
        magnitude = values.detach().flatten(0, -2).abs().float()
        # Not Tensor.quantile, which takes no more than 2^24 numbers.
        place = max(1, math.ceil(quantile * len(magnitude)))
        now = Range(magnitude.amax(0), magnitude.kthvalue(place, dim=0).values)
        old = found.get(name, now)
        found[name] = Range(torch.maximum(old.maximum, now.maximum), torch.maximum(old.quantile, now.quantile))

    def watch(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        record(name, inputs[0])

    def scan(name: str, mixer: Any, inputs: Any, *rest: Any) -> Any:
        y, state = type(mixer)._scan(mixer, inputs, *rest)
        for part, values in (("x", inputs.x), ("B", inputs.B), ("C", inputs.C)):
            record(f"{name}.{part}", values.flatten(2))
        record(f"{name}.y", y)
        return y, state

    handles, mixers = [], []
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear | QuantizedLinear):
            handles.append(part.register_forward_pre_hook(partial(watch, name)))
        elif isinstance(part, Mamba2 | DiscreteMamba2):
            object.__setattr__(part, "_scan", partial(scan, name, part))
            mixers.append(part)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for mixer in mixers:
            del mixer.__dict__["_scan"]


def fake_quantize(x: Tensor, maximum: Tensor | float, *, bits: int = 8) -> Tensor:
    """Round to the steps of a symmetric integer, with the gradient of the identity inside of the range.

    Args:
        x: (..., c).
        maximum: Largest magnitude that is told apart, for all channels or (c,); what lies beyond is clamped.
        bits: Of the integer, at least 2.

    Raises:
        ValueError: if there are fewer bits.
    """
    if bits < 2:
        raise ValueError(f"`bits` must be at least 2, got {bits}.")
    most = 2 ** (bits - 1) - 1
    scale = torch.as_tensor(maximum, dtype=x.dtype, device=x.device) / most
    scale = torch.where(scale > 0, scale, 1)
    clamped = torch.minimum(torch.maximum(x, -most * scale), most * scale)
    return clamped + ((clamped / scale).round() * scale - clamped).detach()


@contextmanager
def quantized_activations(model: nn.Module, ranges: Mapping[str, Range], *, bits: int = 8) -> Iterator[None]:
    """Run a model as if the inputs of its linear layers were integers, one scale for each layer.

    Args:
        model: The model that was observed, or its `quantize`d copy.
        ranges: From `observe`; layers without a range stay as they are.
        bits: Of the integers.
    """

    def rounded(limit: Tensor, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fake_quantize(inputs[0], limit, bits=bits), *inputs[1:])

    handles = [
        part.register_forward_pre_hook(partial(rounded, ranges[name].quantile.max()))
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | QuantizedLinear) and name in ranges
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reorder_(mixer: Mamba2 | DiscreteMamba2, maxima: Tensor) -> Tensor:
    """Sort heads, and channels within heads, by their range, so that neighbours can share a scale.

    Args:
        mixer: Changed in place; what it computes stays the same. Heads move within the group that shares B and C.
        maxima: Range of each channel of x, (d_ssm,), such as `observe(model)["...mixer.x"].quantile`.

    Returns:
        Old place of each channel, (d_ssm,).

    Raises:
        TypeError: if it is another mixer.
        ValueError: if there is not one range per channel.
    """
    if not isinstance(mixer, Mamba2 | DiscreteMamba2):
        raise TypeError(f"expected a Mamba2 or DiscreteMamba2, got {type(mixer).__name__}.")
    if maxima.shape != (mixer.d_ssm,):
        raise ValueError(f"`maxima` must be ({mixer.d_ssm},), one per channel, got shape {tuple(maxima.shape)}.")
    by_head = maxima.unflatten(0, (mixer.ngroups, -1, mixer.headdim))
    within = by_head.argsort(dim=-1, stable=True).flatten(0, 1)  # (h, p)
    order = by_head.amax(-1).argsort(dim=-1, stable=True)  # (g, h / g)
    heads = (order + torch.arange(mixer.ngroups, device=order.device)[:, None] * order.shape[1]).flatten()
    channels = (heads[:, None] * mixer.headdim + within[heads]).flatten()

    rest = torch.arange(2 * mixer.ngroups * mixer.d_state, device=channels.device) + mixer.d_ssm
    mixed = torch.cat([channels, rest])  # x moves, B and C stay
    if isinstance(mixer, Mamba2):
        outside = torch.arange(mixer.splits[0], device=channels.device)
        parts = [outside, outside, channels, mixed, heads]
    else:
        outside = channels[:0]
        parts = [mixed, channels, heads]
    starts = [sum(mixer.splits[:place]) for place in range(len(parts))]
    rows = torch.cat([part + start for part, start in zip(parts, starts)])
    moves = {"conv1d.weight": mixed, "conv1d.bias": mixed, "in_proj.weight": rows, "in_proj.bias": rows}
    moves |= {"dt_bias": heads, "A_log": heads, "z_bias": channels, "norm.weight": channels}
    moves["D"] = heads if mixer.D.shape[0] == mixer.nheads else channels
    for name, parameter in mixer.named_parameters():
        if name in moves:
            parameter.copy_(parameter[moves[name]])
        elif name == "init_states":
            parameter.copy_(parameter[heads].gather(1, within[heads][..., None].expand_as(parameter)))
        elif name == "out_proj.weight":
            parameter.copy_(parameter[:, torch.cat([outside, channels + len(outside)])])
    return channels


def _linear_names(model: nn.Module) -> list[str]:
    """Linear layers whose weight nothing else has."""
    owners: dict[int, int] = {}
    for part in model.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [
        name
        for name, part in model.named_modules()
        if type(part) is nn.Linear and name and owners[id(part.weight)] == 1
    ]


def _quantized_names(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, QuantizedLinear)]


def _replaced(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy in evaluation mode with int8 layers of these names."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    new: dict[int, QuantizedLinear] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear: Any = model.get_submodule(name)
        new[id(linear)] = QuantizedLinear(linear)
        setattr(model.get_submodule(parent), leaf, new[id(linear)])
    for part in model.modules():  # layers that a mixer shares with another one, outside of its own modules
        for attribute, value in list(vars(part).items()):
            if id(value) in new:
                object.__setattr__(part, attribute, new[id(value)])
    return model


__all__ = [
    "QuantizedLinear",
    "Range",
    "fake_quantize",
    "load_quantized",
    "model_bytes",
    "observe",
    "quantize",
    "quantized_activations",
    "reorder_",
    "save_quantized",
]
