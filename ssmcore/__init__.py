"""Building blocks of state-space models, without domain words."""

from .blocks import GatedMLP as GatedMLP
from .blocks import Residual as Residual
from .blocks import RMSNorm as RMSNorm
from .blocks import Stack as Stack
from .mixers import Chimera2D as Chimera2D
from .mixers import create_mixer as create_mixer
from .parallel import DoubleMixer as DoubleMixer
from .sequence_model import SequenceModel as SequenceModel

__all__ = [
    "Chimera2D",
    "DoubleMixer",
    "GatedMLP",
    "RMSNorm",
    "Residual",
    "SequenceModel",
    "Stack",
    "create_mixer",
]
