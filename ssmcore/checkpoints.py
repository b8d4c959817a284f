"""Checkpoints of published models: names and configurations, both ways.

    model = load_checkpoint("mamba2-130m")                     a folder with config.json and model.safetensors
    save_checkpoint(model, "copy", "hf_mamba2")

| family | what |
| --- | --- |
| `state_spaces` | Mamba, Mamba-2 and Mamba-3 of state-spaces/mamba, with attention layers and MLPs |
| `hf_mamba`, `hf_mamba2`, `hf_falcon_mamba` | Mamba, Mamba-2 and FalconMamba of transformers |
| `mambapy` | the Mamba language model of alxndrTL/mamba.py; its configuration with `vocab_size` |
| `hydra_bert` | the masked language model of goombalab/hydra |

Inside a mixer our names are the published ones, so that a mixer's own weights load as they are. Pickles are refused
unless asked for, and give tensors and plain values even then.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .checkpoint_configs import FAMILIES, Family
from .masked_model import MaskedModel
from .sequence_model import SequenceModel
from .training.checkpoints import read_weights, write_atomic

Model = SequenceModel | MaskedModel

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def load_checkpoint(
    path: str | os.PathLike[str],
    family: str | None = None,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """Build a published model and load its weights.

    Args:
        path: Folder with `config.json` and weights (also in parts with an index), or a file of weights.
        family: Layout, see above; None: as the configuration says.
        config: Configuration, or its JSON file, where `path` is a file or has none.
        options: Options of the mixers that the configuration does not say, such as `a_activation` of Mamba-3.
        allow_pickle: Also read `pytorch_model.bin`; only tensors and plain values, even then.
        device: Where to put the model.
        dtype: Of the parameters; None: float32. Those of the recurrences are float32 at least.

    Raises:
        FileNotFoundError: if weights or configuration are missing.
        ValueError: if the family is unknown, an entry of the configuration is, or weights are missing, unknown or of
            another shape; the message lists all of them.
    """
    path = Path(path)
    if isinstance(config, Mapping):
        entries = config
    else:
        file = path / "config.json" if config is None else Path(config)
        if not file.is_file():
            raise FileNotFoundError(f"no configuration at {file}; pass `config`, a dictionary or a JSON file.")
        entries = _json_object(file)
    state = _read(path, allow_pickle)
    return from_checkpoint(state, entries, family, options=options, device=device, dtype=dtype)


def from_checkpoint(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    family: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """Build a model from published weights and their configuration, see `load_checkpoint`.

    Args:
        state: Weights by published names.
        config: As the publisher's JSON file.
        family: Layout; None: as the configuration says.
        options: Options of the mixers beyond the configuration.
        device: Where to put the model.
        dtype: Of the parameters.
    """
    found = _family(family or detect_family(config))
    try:
        arguments = found.read(dict(config), dict(options or {}))
        model: Model = (MaskedModel if found.masked else SequenceModel)(**arguments, device=device, dtype=dtype)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the configuration does not describe a model that can be built: {reason}.") from error
    _load(model, state, found)
    return model


def to_checkpoint(model: nn.Module, family: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under the names of a family, and its configuration.

    Args:
        model: `SequenceModel`, or `MaskedModel` for "hydra_bert".
        family: Layout.

    Raises:
        ValueError: if the family is unknown, or cannot hold a part of the model.
        TypeError: if the model is of another kind.
    """
    found = _family(family)
    kind = MaskedModel if found.masked else SequenceModel
    if not isinstance(model, kind):
        raise TypeError(f"family {family!r} holds a {kind.__name__}, got {type(model).__name__}.")
    config = found.write(model)
    _refuse_loss(model, kind(**found.read(dict(config), {}), device="meta"), family)
    return {found.theirs(name): tensor.detach() for name, tensor in model.state_dict().items()}, config


def save_checkpoint(model: nn.Module, folder: str | os.PathLike[str], family: str) -> None:
    """Write `config.json` and `model.safetensors` of a family; tied weights once.

    Args:
        model: `SequenceModel`, or `MaskedModel` for "hydra_bert".
        folder: Made if it does not exist; files in it are replaced whole.
        family: Layout.

    Raises:
        ValueError: if the family is unknown, or cannot hold a part of the model.
    """
    state, config = to_checkpoint(model, family)
    kept: dict[int, str] = {}
    for name, tensor in state.items():
        kept.setdefault(tensor.data_ptr(), name)
    tensors = {name: state[name].cpu().contiguous() for name in kept.values()}
    write_atomic(Path(folder) / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_atomic(Path(folder) / "config.json", json.dumps(config, indent=2))


def detect_family(config: Mapping[str, Any]) -> str:
    """The family that a configuration is of.

    Raises:
        ValueError: if it is of none; the message lists those there are.
    """
    kind = {"mamba": "hf_mamba", "mamba2": "hf_mamba2", "falcon_mamba": "hf_falcon_mamba"}.get(
        config.get("model_type", "")
    )
    if kind is not None and "hidden_size" in config:
        return kind
    if "d_model" in config and "n_layer" in config:
        return "state_spaces"
    if "d_model" in config and "n_layers" in config:
        return "mambapy"
    if config.get("matrix_mixer_type") == "hydra":
        return "hydra_bert"
    raise ValueError(f"the configuration is of no known family; name one as `family`: {', '.join(FAMILIES)}.")


def _family(name: str) -> Family:
    if name not in FAMILIES:
        close = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"Unknown checkpoint family {name!r}. {hint}Known: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def _read(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if not path.is_dir():
        return read_weights(path, allow_pickle=allow_pickle)
    for name in _WEIGHTS:
        file = path / name
        if not file.is_file():
            continue
        if file.suffix != ".json":
            return read_weights(file, allow_pickle=allow_pickle)
        parts = _json_object(file).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
            raise ValueError(f"{file} has no `weight_map` from names of weights to files.")
        parts = sorted(set(parts.values()))
        outside = [part for part in parts if Path(part).name != part]
        if outside:
            raise ValueError(f"{file} names the file {outside[0]!r} outside its folder.")
        state: dict[str, Tensor] = {}
        for part in parts:
            state.update(read_weights(path / part))
        return state
    raise FileNotFoundError(f"no weights in {path}; expected one of {', '.join(_WEIGHTS)}.")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def _load(model: Model, state: Mapping[str, Tensor], family: Family) -> None:
    """Copy weights after listing all that does not fit, under the published names."""
    own = model.state_dict(keep_vars=True)
    given = {family.ours(name): tensor for name, tensor in state.items() if not re.search(family.ignored, name)}
    problems = []
    tied = {name: [other for other in own if other != name and own[other] is own[name]] for name in own}
    for name, parameter in own.items():
        others = [other for other in tied[name] if other in given]
        if name not in given:
            if not others:
                problems.append(f"`{family.theirs(name)}` is missing")
        elif given[name].shape != parameter.shape:
            shapes = f"{tuple(given[name].shape)}, expected {tuple(parameter.shape)}"
            problems.append(f"`{family.theirs(name)}` is {shapes}{_vocabulary(name, model)}")
        elif any(
            given[other].shape == given[name].shape and not torch.equal(given[other], given[name]) for other in others
        ):
            problems.append(f"`{family.theirs(name)}` differs from the weight that it is tied to")
    problems += [
        f"`{name}` is not in the model"
        for name in state
        if family.ours(name) not in own and not re.search(family.ignored, name)
    ]
    if problems:
        raise ValueError(f"the weights do not fit the configuration in {len(problems)} places: {'; '.join(problems)}.")
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


# Attributes of modules that change no value, or only the width of additions.
_FREE = {"training", "chunk_size", "checkpoint_every", "residual_in_fp32"}


def _refuse_loss(model: nn.Module, twin: nn.Module, family: str) -> None:
    """Compare a model with what its written configuration builds: what a family cannot say would be lost in silence."""
    own, other = ({name: _settings(part) for name, part in of.stack.named_modules()} for of in (model, twin))  # type: ignore[union-attr, operator]
    lost = [
        f"`{name}.{key}` {value!r} would be read as {other.get(name, {}).get(key)!r}"
        for name, settings in own.items()
        for key, value in settings.items()
        if name not in other or other[name].get(key) != value
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            lost.append(f"`{name}` {tuple(tensor.shape)} would be read as {shapes.get(name)}")
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ValueError(f"family {family!r} cannot hold the model: {'; '.join(lost[:5])}{more}.")


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain values among a module's attributes."""
    plain = (bool, int, float, str, tuple, type(None))
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, plain) and key not in _FREE and not key.startswith("_")
    }


def _vocabulary(name: str, model: Model) -> str:
    if not name.startswith(("embedding.", "head.")):
        return ""
    return f" (the configuration says {model.vocab_size} symbols)"


__all__ = [
    "FAMILIES",
    "detect_family",
    "from_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "to_checkpoint",
]
