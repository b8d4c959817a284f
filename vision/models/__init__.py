"""Vision models by family; importing this package registers all of them with timm."""

from .a2mamba import A2Mamba as A2Mamba
from .chimera_vit import ChimeraViT as ChimeraViT
from .hydra_vit import HydraViT as HydraViT
from .mambavision import MambaVision as MambaVision
from .plainmamba import PlainMamba as PlainMamba
from .segman import SegMAN as SegMAN
from .vim import Vim as Vim
from .vim2 import ViM2 as ViM2
from .vmamba import VMamba as VMamba

__all__ = ["A2Mamba", "ChimeraViT", "HydraViT", "MambaVision", "PlainMamba", "SegMAN", "VMamba", "ViM2", "Vim"]
