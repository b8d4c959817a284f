"""Checkpoints of published models: names of weights, both ways.

H-Net (`goombalab/hnet`) and Caduceus (`kuleshov-group/caduceus`): `.safetensors`, or pickles of tensors alone; the
configuration is a JSON file.
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
from .masked import MaskedDNA

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
    model = HNet(**_read_config(config))
    state = from_official(read_weights(weights, allow_pickle=allow_pickle))
    load_weights(model, state, source=str(weights))
    return cast_weights(model, dtype)


def load_caduceus(
    weights: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any],
    *,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> MaskedDNA:
    """Build a published Caduceus and load its weights.

    Equivariant weights that were trained with fused norms get `swap_halves`: the fused blocks hand the vectors of one
    strand to the other's place at every layer.

    Args:
        weights: `.safetensors` file, or a pickle of tensors.
        config: The model's `config.json`, or what it holds.
        allow_pickle: Also read `.pt` and `.bin` files; only tensors and plain values, even then.
        dtype: Of the loaded weights, as for `load_hnet`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, a pickle that was not allowed, or is of a kind that this model cannot be.
    """
    given = _read_config(config)
    wanted = {"bidirectional": True, "bidirectional_strategy": "add", "bidirectional_weight_tie": True}
    for name, value in wanted.items():
        if given.get(name, value) != value:
            raise ValueError(f"expected a Caduceus with {name} {value!r}, got {name} {given[name]!r}.")
    equivariant = bool(given.get("rcps", False))
    ssm = given.get("ssm_cfg") or {}
    options = {name: ssm[name] for name in ("d_state", "d_conv", "expand") if name in ssm}
    if ssm.get("dt_rank", "auto") != "auto":
        options["dt_rank"] = ssm["dt_rank"]
    multiple = given.get("pad_vocab_size_multiple", 8)
    model = MaskedDNA(
        given["d_model"],
        given["n_layer"],
        mixer="mamba",
        mixer_options=options,
        strands="equivariant" if equivariant else "one",
        swap_halves=equivariant and bool(given.get("fused_add_norm", True)),
        vocab_size=-(-given["vocab_size"] // multiple) * multiple,
        vocabulary="char",
    )
    state: dict[str, Tensor] = {}
    for name, tensor in read_weights(weights, allow_pickle=allow_pickle).items():
        shared = re.search(r"\.mamba_rev\.(in|out)_proj\.", name)
        if not shared and not name.endswith("complement_map"):
            state[_caduceus_name(name)] = tensor
    load_weights(model, state, source=str(weights))
    return cast_weights(model, dtype)


def _caduceus_name(name: str) -> str:
    """Our name of a weight."""
    name = name.removeprefix("caduceus.").removeprefix("backbone.").replace(".submodule.", ".")
    if name.startswith("embeddings."):
        return "embeddings.weight"
    if name.startswith("lm_head."):
        return "lm_head.weight"
    name = name.replace("norm_f.", "stack.norm.").replace(".mamba_fwd.", ".ahead.").replace(".mamba_rev.", ".back.")
    return re.sub(r"^layers\.", "stack.blocks.", name)


def _read_config(config: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"configuration {str(path)!r} does not exist.")
    return json.loads(path.read_text())


_Model = TypeVar("_Model", bound=nn.Module)


def cast_weights(model: _Model, dtype: torch.dtype | None) -> _Model:
    """Cast the weights in place, recurrence parameters and `residual_proj` to float32 at least; None leaves all."""
    if dtype is not None:
        for name, parameter in model.named_parameters():
            exact = name.rpartition(".")[2] in ("A_log", "dt_bias", "D") or ".residual_proj." in name
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32) if exact else dtype)
    return model
