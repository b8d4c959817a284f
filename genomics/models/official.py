"""Checkpoints of published models: names of weights, both ways.

H-Net (`goombalab/hnet`): `.safetensors`, or `.pt` with tensors alone; the configuration is a JSON file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...ssmcore.mixers import Attention
from ...ssmcore.training.checkpoints import load_weights, read_weights
from .hnet import HNet

# Our `Stack` and `Attention` against the published names, applied to whole parts of a name.
_HNET_NAMES = (
    (r"\.layers\.(\d+)\.norm1\.", r".blocks.\1.norm."),
    (r"\.layers\.(\d+)\.norm2\.", r".blocks.\1.mlp_norm."),
    (r"\.layers\.(\d+)\.mixer\.Wqkv\.", r".blocks.\1.mixer.in_proj."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"\.rmsnorm\.", ".norm."),
)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names, given those of a published H-Net."""
    return {_ours(name): tensor for name, tensor in state.items()}


def to_official(model: HNet) -> dict[str, Tensor]:
    """Weights of a model under the names of published H-Nets."""
    attention = {name for name, part in model.named_modules() if isinstance(part, Attention)}
    state = {}
    for name, tensor in model.state_dict().items():
        new = re.sub(r"\.blocks\.(\d+)\.norm\.", r".layers.\1.norm1.", name)
        new = re.sub(r"\.blocks\.(\d+)\.mlp_norm\.", r".layers.\1.norm2.", new)
        if name.removesuffix(".in_proj.weight") in attention:
            new = new.replace(".in_proj.", ".Wqkv.")
        new = re.sub(r"\.blocks\.(\d+)\.", r".layers.\1.", new)
        state[re.sub(r"(encoder|decoder|main_network)\.norm\.", r"\1.rmsnorm.", new)] = tensor
    return state


def _ours(name: str) -> str:
    for pattern, replacement in _HNET_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load_hnet(
    weights: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any],
    *,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> HNet:
    """Build a published H-Net and load its weights.

    Args:
        weights: `.safetensors` file, or a `.pt` file of tensors.
        config: The model's JSON file, or what it holds.
        allow_pickle: Also read `.pt` files; only tensors and plain values, even then.
        dtype: Of the loaded weights; None keeps that of the file. `residual_proj`, `A_log`, `dt_bias` and `D` are
            float32 at least.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, a pickle that was not allowed, or does not fit the configuration.
        TypeError: if the configuration has an unknown entry.
    """
    if isinstance(config, Mapping):
        options = dict(config)
    else:
        path = Path(config)
        if not path.is_file():
            raise FileNotFoundError(f"configuration {str(path)!r} does not exist.")
        options = json.loads(path.read_text())
    model = HNet(**options)
    state = from_official(read_weights(weights, allow_pickle=allow_pickle))
    load_weights(model, state, source=str(weights))
    return cast_weights(model, dtype)


_Model = TypeVar("_Model", bound=nn.Module)


def cast_weights(model: _Model, dtype: torch.dtype | None) -> _Model:
    """Cast the weights in place, recurrence parameters and `residual_proj` to float32 at least; None leaves all."""
    if dtype is not None:
        for name, parameter in model.named_parameters():
            exact = name.rpartition(".")[2] in ("A_log", "dt_bias", "D") or ".residual_proj." in name
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if exact else dtype)
    return model
