"""State-space backbones for images, registered with timm: `timm.create_model(name)` works after this import."""

from .models import ChimeraViT as ChimeraViT
from .models import HydraViT as HydraViT
from .models import Vim as Vim
from .registry import create_model as create_model
from .registry import list_models as list_models

__all__ = ["ChimeraViT", "HydraViT", "Vim", "create_model", "list_models"]
