"""Building blocks of state-space models, without domain words."""

from .blocks import GatedMLP as GatedMLP
from .blocks import Residual as Residual
from .blocks import RMSNorm as RMSNorm
from .blocks import Stack as Stack
from .mixers import Chimera2D as Chimera2D
from .mixers import create_mixer as create_mixer

__all__ = ["Chimera2D", "GatedMLP", "RMSNorm", "Residual", "Stack", "create_mixer"]
