"""Graph models by name. A model maps a `GraphBatch` to numbers per graph, node or pair of nodes."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ...ssmcore.mixers import GraphSSM
from ...ssmcore.training.options import check_kinds
from .ensemble import GraphEnsemble
from .graph_model import GraphModel
from .hybrid import HybridLayer
from .layers import GPSLayer, MessageLayer, NodeLayer, SSMLayer

__all__ = ["MODELS", "GraphEnsemble", "GraphModel", "create_model", "list_models", "model_options"]


class Entry(NamedTuple):
    """A named model: its layer, its defaults, and what it is in one line."""

    layer: Callable[..., nn.Module]
    defaults: dict[str, Any]
    about: str


DAG = {"acyclic": True, "bidirectional": True}
GENERAL = {"acyclic": False, "local": "gated_gcn"}

MODELS: dict[str, Entry] = {
    "dag_ssm_tiny": Entry(SSMLayer, DAG | {"d_model": 64, "n_layer": 4}, "scans in both directions of a DAG"),
    "dag_ssm_small": Entry(SSMLayer, DAG | {"d_model": 128, "n_layer": 6, "d_state": 32}, "the same, wider and deeper"),
    "dag_gine_tiny": Entry(
        SSMLayer, DAG | {"d_model": 64, "n_layer": 4, "local": "gine"}, "GINE before each scan of a DAG"
    ),
    "order_gine_tiny": Entry(
        SSMLayer,
        {"d_model": 64, "n_layer": 2, "local": "gine", "along": "order", "d_state": 8, "headdim": 32},
        "GINE, then the nodes in the order of their numbers",
    ),
    "chimera_graph_tiny": Entry(
        SSMLayer, GENERAL | {"d_model": 64, "n_layer": 4}, "GatedGCN, resolvent of any graph, MLP"
    ),
    "chimera_graph_base": Entry(
        SSMLayer, GENERAL | {"d_model": 64, "n_layer": 8, "d_state": 64}, "the published size for long-range sets"
    ),
    "gsm_pp": Entry(
        HybridLayer, {"d_model": 64, "n_layer": 1}, "GSM++: GatedGCN, then Mamba-2 and attention over clusters"
    ),
    "mlp": Entry(NodeLayer, {"d_model": 64, "n_layer": 2}, "baseline: nodes alone, no edges"),
    "gcn": Entry(MessageLayer, {"d_model": 64, "n_layer": 4, "kind": "gcn"}, "baseline: graph convolution"),
    "gine": Entry(MessageLayer, {"d_model": 64, "n_layer": 4, "kind": "gine"}, "baseline: GINE"),
    "gps": Entry(GPSLayer, {"d_model": 64, "n_layer": 4}, "baseline: GINE and attention"),
}
"""Layer, settings and description of each model, by the name that `create_model` takes."""


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, e.g. "dag_*"."""
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(name: str, *, members: int = 1, **args: Any) -> GraphModel | GraphEnsemble:
    """Build a model by name.

    Args:
        name: One of `list_models()`.
        members: How many models to train side by side and to average; with one there is no ensemble.
        **args: What the data are (`node_vocab`, `edge_features`, `num_outputs`, `level`, ...), and options of
            `GraphModel`, the layers and their mixer.

    Raises:
        ValueError: for an unknown model, with close names, and for less than one member.
        TypeError: for an option that the model does not have, with close names, or a value of another kind.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"Unknown graph model {name!r}.{hint} list_models() shows all {len(MODELS)}.")
    known = model_options(name)
    for option in args:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(known)}"
            raise TypeError(f"model {name!r} has no option {option!r}; {hint}")
    check_kinds(name, _makers(name), {"members": members, **args})
    if members < 1:
        raise ValueError(f"members must be at least 1, got {members}.")
    entry = MODELS[name]
    made = [GraphModel(entry.layer, **{**entry.defaults, **args}) for _ in range(members)]
    return made[0] if members == 1 else GraphEnsemble(made)


def model_options(name: str) -> list[str]:
    """Names of all options of a model."""
    names: dict[str, None] = {}
    for source in _makers(name):
        for parameter in inspect.signature(source).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                names[parameter.name] = None
    return [name for name in names if name not in ("has_edges", "update_edges", "d_edge", "device", "dtype")]


def _makers(name: str) -> list[Any]:
    """What takes the options of a model."""
    layer = MODELS[name].layer
    return [create_model, GraphModel, layer, *([GraphSSM] if layer is SSMLayer else [])]
