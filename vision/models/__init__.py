"""Vision models by family; importing this package registers all of them with timm."""

from .chimera_vit import ChimeraViT as ChimeraViT
from .vim import Vim as Vim

__all__ = ["ChimeraViT", "Vim"]
