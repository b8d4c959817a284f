"""Vision models by family; importing this package registers all of them with timm."""

from .vim import Vim as Vim

__all__ = ["Vim"]
