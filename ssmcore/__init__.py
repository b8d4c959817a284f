"""Building blocks of state-space models, without domain words."""

from .accounting import account as account
from .blocks import GatedMLP as GatedMLP
from .blocks import Residual as Residual
from .blocks import RMSNorm as RMSNorm
from .blocks import Stack as Stack
from .mixers import S4D as S4D
from .mixers import Attention as Attention
from .mixers import Bidirectional as Bidirectional
from .mixers import Chimera2D as Chimera2D
from .mixers import DiscreteMamba2 as DiscreteMamba2
from .mixers import Hydra as Hydra
from .mixers import LBMamba as LBMamba
from .mixers import Mamba as Mamba
from .mixers import Mamba2 as Mamba2
from .mixers import Mamba3 as Mamba3
from .mixers import create_mixer as create_mixer
from .parallel import DoubleMixer as DoubleMixer
from .sequence_model import SequenceModel as SequenceModel

__all__ = [  # noqa: RUF022  (takes S4D for a constant)
    "Attention",
    "Bidirectional",
    "Chimera2D",
    "DiscreteMamba2",
    "DoubleMixer",
    "GatedMLP",
    "Hydra",
    "LBMamba",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "RMSNorm",
    "Residual",
    "S4D",
    "SequenceModel",
    "Stack",
    "account",
    "create_mixer",
]
