"""Vision models by family; importing this package registers all of them with timm."""

from .chimera_vit import ChimeraViT as ChimeraViT
from .hydra_vit import HydraViT as HydraViT
from .vim import Vim as Vim

__all__ = ["ChimeraViT", "HydraViT", "Vim"]
