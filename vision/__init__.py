"""State-space backbones for images, registered with timm: `timm.create_model(name)` works after this import."""

from .models import A2Mamba as A2Mamba
from .models import ChimeraViT as ChimeraViT
from .models import HydraViT as HydraViT
from .models import MambaVision as MambaVision
from .models import PlainMamba as PlainMamba
from .models import SegMAN as SegMAN
from .models import Vim as Vim
from .models import ViM2 as ViM2
from .models import VMamba as VMamba
from .registry import create_model as create_model
from .registry import list_models as list_models

__all__ = [
    "A2Mamba",
    "ChimeraViT",
    "HydraViT",
    "MambaVision",
    "PlainMamba",
    "SegMAN",
    "VMamba",
    "ViM2",
    "Vim",
    "create_model",
    "list_models",
]
