"""Models of DNA by name. Each maps ids (b, l) to logits (b, l, V); supervised ones to predictions (b, n)."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...ssmcore.training.checkpoints import load_weights, read_model_folder, save_model_folder
from ...ssmcore.training.options import check_kinds
from ..sequence import vocabulary
from .hnet import (
    HNet,
    dnahnet_base,
    dnahnet_debug,
    dnahnet_small,
    hnet_hg38_m15,
    hnet_hg38_t15,
    hnet_tiny,
)
from .hybridna import hybridna_300m, hybridna_tiny
from .isotropic import (
    mamba2_debug,
    mamba2_hg38,
    mamba2_small,
    transformer_debug,
    transformer_hg38,
    transformer_small,
)
from .lyra import Lyra, lyra
from .markov import MarkovModel
from .masked import (
    MaskedDNA,
    caduceus_ph_1k,
    caduceus_ph_131k,
    caduceus_ps_1k,
    caduceus_ps_131k,
    hydra_dna_ps_small,
    hydra_dna_small,
    hydra_dna_tiny,
)
from .official import cast_weights
from .official import load_caduceus as load_caduceus
from .official import load_hnet as load_hnet
from .predictor import SequencePredictor

__all__ = [
    "MODELS",
    "HNet",
    "Lyra",
    "MarkovModel",
    "MaskedDNA",
    "SequencePredictor",
    "create_model",
    "from_pretrained",
    "list_models",
    "load_caduceus",
    "load_hnet",
    "model_options",
    "pretrained_models",
    "save_pretrained",
]

HUB = "hf-hub:"  # what a name begins with that may be fetched
PACKAGED = Path(__file__).resolve().parents[1] / "pretrained"

MODELS: dict[str, Callable[..., nn.Module]] = {
    "hnet": HNet,
    "hnet_tiny": hnet_tiny,
    "dnahnet_debug": dnahnet_debug,
    "dnahnet_small": dnahnet_small,
    "dnahnet_base": dnahnet_base,
    "hnet_hg38_t15": hnet_hg38_t15,
    "hnet_hg38_m15": hnet_hg38_m15,
    "mamba2_debug": mamba2_debug,
    "mamba2_small": mamba2_small,
    "mamba2_hg38": mamba2_hg38,
    "transformer_debug": transformer_debug,
    "transformer_small": transformer_small,
    "transformer_hg38": transformer_hg38,
    "hybridna_tiny": hybridna_tiny,
    "hybridna_300m": hybridna_300m,
    "masked_dna": MaskedDNA,
    "caduceus_ph_1k": caduceus_ph_1k,
    "caduceus_ps_1k": caduceus_ps_1k,
    "caduceus_ph_131k": caduceus_ph_131k,
    "caduceus_ps_131k": caduceus_ps_131k,
    "hydra_dna_tiny": hydra_dna_tiny,
    "hydra_dna_small": hydra_dna_small,
    "hydra_dna_ps_small": hydra_dna_ps_small,
    "lyra": lyra,
    "predictor": SequencePredictor,
    "markov": MarkovModel,
}
"""What builds each model, by the name that `create_model` takes."""


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, e.g. "dnahnet_*"."""
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(name: str, **args: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: One of `list_models()`.
        args: Options of the model that differ from the preset.

    Raises:
        ValueError: for an unknown model; the message names close ones.
        TypeError: for an option that the model does not have, with close names, or a value of another kind.
    """
    known = model_options(name)
    for option in args:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"Model {name!r} has no option {option!r}. {hint}It takes {', '.join(known)}.")
    check_kinds(name, [_class(name)], args)
    model: Any = MODELS[name](**args)
    model.name = name
    return model


def pretrained_models() -> list[str]:
    """Names of the trained models that come with the package, for `from_pretrained`; each has a card, README.md."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/config.json"))


def is_supervised(name: str) -> bool:
    """Whether a model has its own head and maps ids (b, l) to predictions (b, n).

    Raises:
        ValueError: for an unknown model.
    """
    return bool(getattr(_class(name), "supervised", False))


def model_options(name: str) -> list[str]:
    """Names of all options of a model: those of the class that a preset builds."""
    return list(inspect.signature(_class(name)).parameters)


def _class(name: str) -> Any:
    """The class that a name builds."""
    if name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"Unknown genomics model {name!r}. {hint}list_models() shows all {len(MODELS)}.")
    entry = MODELS[name]
    return entry if inspect.isclass(entry) else inspect.get_annotations(entry, eval_str=True)["return"]


def save_pretrained(model: nn.Module, folder: str | os.PathLike, *, dtype: torch.dtype | None = torch.float32) -> Path:
    """Write a model folder: config.json, model.safetensors, vocabulary.json and a card.

    Args:
        model: A model of this package.
        folder: Where to; an older model folder is replaced in one step.
        dtype: Of the stored weights; None keeps theirs.

    Raises:
        ValueError: if the folder holds something else.
    """
    return save_model_folder(folder, model.state_dict(), model_config(model), vocabulary_file(model), dtype=dtype)


def model_config(model: nn.Module) -> dict[str, Any]:
    """What `config.json` says of a model: its name and every option, so that later presets do not change it."""
    name = getattr(model, "name", None) or model.family
    return {"model": f"genomics/{name}", "args": model.config, "task": {}}


def vocabulary_file(model: nn.Module) -> dict[str, str]:
    """`vocabulary.json`, the meaning of the ids."""
    words = vocabulary(str(model.vocabulary))
    meaning = {"name": words.name, "size": words.size, "bases": dict(zip("ACGT", words.bases.tolist()))}
    special = {"pad": words.pad, "bos": words.bos, "mask": words.mask, "unknown": words.unknown, "eos": words.eos}
    return {"vocabulary.json": json.dumps(meaning | special, indent=1) + "\n"}


def from_pretrained(
    source: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """Read a model folder, ready for evaluation.

    Args:
        source: The folder, a run's folder that holds one named `model`, one of `pretrained_models()`, or a repository
            of the Hugging Face hub as "hf-hub:OWNER/NAME" (fetched once; in its offline mode only what was before).
            Nothing else asks the network.
        device: Where to put the model.
        dtype: Of the weights; None keeps what the file holds. Recurrence parameters are float32 at least.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the folder is damaged, holds a model of another domain, or does not fit its configuration.
    """
    path = Path(source)
    if not path.exists() and str(source) in pretrained_models():
        path = PACKAGED / source
    elif isinstance(source, str) and source.startswith(HUB):
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(source.removeprefix(HUB), allow_patterns=["*.json", "*.safetensors"]))
    if not (path / "config.json").is_file() and (path / "model" / "config.json").is_file():
        path = path / "model"
    folder = read_model_folder(path)
    domain, _, name = str(folder.config["model"]).partition("/")
    if domain != "genomics" or name not in MODELS:
        raise ValueError(f"{str(path)!r} holds {folder.config['model']!r}, expected a model of genomics.")
    model = create_model(name, **folder.config["args"])
    load_weights(model, folder.state, source=str(path))
    return cast_weights(model.to(device=device), dtype).eval()
