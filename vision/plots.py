"""Where a model looks: effective receptive fields, the reach of one block, and mixing matrices.

Needs matplotlib (`pip install "omnissm[plot]"`).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ssmcore.training.checkpoints import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "influence", "mixing_matrix", "receptive_field", "save"]


def receptive_field(net: nn.Module, images: Tensor) -> np.ndarray:
    """Effective receptive field: mean size of the gradient of the middle cell's last features, per pixel.

    Args:
        net: A model with `forward_intermediates`.
        images: Normalised, (batch, channels, height, width).

    Returns:
        (height, width), summing to 1.

    Source: Luo, Li, Urtasun & Zemel (2016).
    """
    net.eval()
    images = images.clone().requires_grad_()
    (features,) = net.forward_intermediates(images, indices=1, intermediates_only=True)  # type: ignore[operator]
    middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
    (gradient,) = torch.autograd.grad(middle.relu().sum(), images)
    field = gradient.abs().mean(dim=(0, 1))
    return (field / field.sum().clamp(min=1e-30)).detach().cpu().numpy()


def influence(net: nn.Module, images: Tensor, block: int = 0) -> np.ndarray:
    """How much each cell of one block's mixer moves the middle cell: size of the derivative, averaged over images.

    Args:
        net: One of this package's models.
        images: Normalised, (batch, channels, height, width).
        block: Number of the block, counted over all stages.

    Returns:
        (i, j), summing to 1; the cells of a window for windowed blocks.

    Raises:
        ValueError: if there is no such block with a mixer.
    """
    mixer = _mixers(net, block)
    inputs = _inputs(net, mixer, images).clone().requires_grad_()
    y = mixer(inputs)
    cells = y.flatten(1, -2)
    (gradient,) = torch.autograd.grad(cells[:, cells.shape[1] // 2].sum(), inputs)
    size = gradient.norm(dim=-1).flatten(1).mean(dim=0)
    size = size / size.sum().clamp(min=1e-30)
    if inputs.dim() == 4:
        return size.view(inputs.shape[1:3]).detach().cpu().numpy()
    rows = _rows(net, len(size))
    if rows is None:
        middle = len(size) // 2  # the class token
        size, rows = torch.cat([size[:middle], size[middle + 1 :]]), _rows(net, len(size) - 1)
    return size.view(rows or 1, -1).detach().cpu().numpy()


def mixing_matrix(net: nn.Module, images: Tensor, block: int = 0) -> np.ndarray:
    """Size of a block's mixing matrix, averaged over heads and images, (l, l).

    Raises:
        ValueError: if the block has no such matrix; those of `hydra_vit` have.
    """
    mixer = _mixers(net, block)
    found = getattr(mixer, "mixing_matrix", None)
    if not callable(found):
        raise ValueError(f"{type(mixer).__name__} writes out no mixing matrix; use kind 'influence' for this model.")
    with torch.no_grad():
        return found(_inputs(net, mixer, images)).matrix.abs().mean(dim=(0, 1)).cpu().numpy()


def _mixers(net: nn.Module, block: int) -> nn.Module:
    mixers = [module for name, module in net.named_modules() if name.endswith(".mixer")]
    if not -len(mixers) <= block < len(mixers):
        raise ValueError(f"block {block} is not there; the model has {len(mixers)} blocks with a mixer.")
    return mixers[block]


def _inputs(net: nn.Module, mixer: nn.Module, images: Tensor) -> Tensor:
    """What enters a mixer."""
    seen: list[Tensor] = []
    handle = mixer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    try:
        with torch.no_grad():
            net.eval()(images)
    finally:
        handle.remove()
    return seen[0]


def _rows(net: nn.Module, cells: int) -> int | None:
    """Rows of a grid with this many cells; None if it is neither the model's nor a square."""
    size = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if size is not None and size[0] * size[1] == cells:
        return int(size[0])
    side = round(cells**0.5)
    return side if side * side == cells else None


def draw(values: np.ndarray, title: str, rows: str, columns: str, what: str = "share") -> Figure:
    """A map as a picture with a colour bar, square root of the values, and what they, its rows and columns are.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "omnissm[plot]"') from error
    figure = Canvas(figsize=(5.2, 4.4), layout="constrained")
    axes: Any = figure.subplots()
    shown = axes.imshow(np.sqrt(values), cmap="magma", interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    figure.colorbar(shown, ax=axes, label=f"square root of the {what}")
    return figure


def save(figure: Figure, out: str | Path) -> Path:
    """Write a figure whole or not at all; the suffix is the format."""
    path, buffer = Path(out), io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".").lower(), dpi=150)
    write_atomic(path, buffer.getvalue())
    return path
