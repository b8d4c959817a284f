"""The mixers by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from .attention import Attention as Attention
from .bidirectional import Bidirectional as Bidirectional
from .chimera2d import Chimera2D as Chimera2D
from .companion import Companion as Companion
from .companion import Shift as Shift
from .companion import apply_powers as apply_powers
from .companion import companion_matrix as companion_matrix
from .companion import unit_norm as unit_norm
from .graph_ssm import GraphSSM as GraphSSM
from .graph_ssm import GraphTopology as GraphTopology
from .graph_ssm import graph_topology as graph_topology
from .h3 import H3 as H3
from .hydra import Hydra as Hydra
from .lbmamba import LBMamba as LBMamba
from .long_conv import BlockDiagLinear as BlockDiagLinear
from .long_conv import HyenaFilter as HyenaFilter
from .long_conv import LongConv as LongConv
from .long_conv import MonarchMixer as MonarchMixer
from .long_conv import MonarchMLP as MonarchMLP
from .mamba2 import DiscreteMamba2 as DiscreteMamba2
from .mamba2 import Mamba2 as Mamba2
from .mamba3 import Mamba3 as Mamba3
from .mambamixer import MambaMixer as MambaMixer
from .matrix_mixers import CauchyMixer as CauchyMixer
from .matrix_mixers import DenseMixer as DenseMixer
from .matrix_mixers import LowRankMixer as LowRankMixer
from .matrix_mixers import QuasiseparableMixer as QuasiseparableMixer
from .matrix_mixers import SoftmaxMixer as SoftmaxMixer
from .matrix_mixers import ToeplitzMixer as ToeplitzMixer
from .matrix_mixers import VandermondeMixer as VandermondeMixer
from .memory import GatedMemoryUnit as GatedMemoryUnit
from .nonlinear import ParaGRU as ParaGRU
from .nonlinear import ParaLSTM as ParaLSTM
from .s4 import S4D as S4D
from .s4_dplr import S4 as S4
from .s5 import S5 as S5
from .s6 import Mamba as Mamba
from .seqboat import SeqBoat as SeqBoat
from .sparse_context import HAX as HAX

__all__ = [
    "H3",
    "HAX",
    "MIXERS",
    "S4",
    "S4D",
    "S5",
    "Attention",
    "Bidirectional",
    "BlockDiagLinear",
    "CauchyMixer",
    "Chimera2D",
    "Companion",
    "DenseMixer",
    "DiscreteMamba2",
    "GatedMemoryUnit",
    "GraphSSM",
    "GraphTopology",
    "Hydra",
    "HyenaFilter",
    "LBMamba",
    "LongConv",
    "LowRankMixer",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MambaMixer",
    "MonarchMLP",
    "MonarchMixer",
    "ParaGRU",
    "ParaLSTM",
    "QuasiseparableMixer",
    "SeqBoat",
    "Shift",
    "SoftmaxMixer",
    "ToeplitzMixer",
    "VandermondeMixer",
    "apply_powers",
    "companion_matrix",
    "create_mixer",
    "graph_topology",
    "mixer_options",
    "unit_norm",
]

MIXERS: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "bidirectional": Bidirectional,
    "cauchy": CauchyMixer,
    "chimera2d": Chimera2D,
    "companion": Companion,
    "dense": DenseMixer,
    "discrete_mamba2": DiscreteMamba2,
    "gmu": GatedMemoryUnit,
    "graph_ssm": GraphSSM,
    "h3": H3,
    "hax": HAX,
    "hydra": Hydra,
    "lbmamba": LBMamba,
    "long_conv": LongConv,
    "low_rank": LowRankMixer,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "mambamixer": MambaMixer,
    "monarch": MonarchMixer,
    "paragru": ParaGRU,
    "paralstm": ParaLSTM,
    "quasiseparable": QuasiseparableMixer,
    "s4": S4,
    "s4d": S4D,
    "s5": S5,
    "seqboat": SeqBoat,
    "shift": Shift,
    "softmax_mixer": SoftmaxMixer,
    "toeplitz": ToeplitzMixer,
    "vandermonde": VandermondeMixer,
}
"""Class of each mixer by the name that `create_mixer` takes."""


def create_mixer(name: str, d_model: int, **options: Any) -> nn.Module:
    """Build a mixer by name.

    Args:
        name: A key of `MIXERS`.
        d_model: Width of the stream.
        **options: Keyword arguments of the class.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if the class has no such option; the message suggests a close one and lists those it has.
    """
    _known_options(name, options)
    return MIXERS[name](d_model, **options)


def mixer_options(name: str, **options: Any) -> dict[str, Any]:
    """All options of a mixer with their values, for a configuration that keeps its meaning when defaults change.

    Args:
        name: A key of `MIXERS`.
        **options: Those that differ from the defaults. `device` and `dtype` are left out of the result.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if the class has no such option.
    """
    defaults = _known_options(name, options)
    return {key: value for key, value in {**defaults, **options}.items() if key not in ("device", "dtype")}


def _known_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The defaults of a mixer's options, which the given ones must be among."""
    if name not in MIXERS:
        raise ValueError(f"Unknown mixer {name!r}. {_suggestion(name, MIXERS)}Known: {', '.join(sorted(MIXERS))}.")
    parameters = inspect.signature(MIXERS[name]).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key != "d_model"}
    for option in options:
        if option not in defaults:
            hint = _suggestion(option, defaults)
            raise TypeError(f"Mixer {name!r} has no option {option!r}. {hint}It takes {', '.join(defaults)}.")
    return defaults


def _suggestion(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}? " if close else ""
