"""Looking into mixers: their matrices on given inputs, how far tokens reach each other, and pictures of both.

    found = mixing_matrices(stack, x)                       one `MixingMatrix` per layer that has one
    draw_matrix(found[0].matrix[0], "layer 0").savefig("layer0.png")
    reach = token_jacobian(mixer, x)                        any mixer, linear in its input or not

Ali, Zimerman & Wolf (2024), "The Hidden Attention of Mamba Models", for the matrices.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blocks import Stack
from .mixers.common import MixingMatrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def mixing_matrices(stack: Stack, x: Tensor) -> dict[int, MixingMatrix]:
    """The matrix of each layer on what reaches it when the stack runs on x.

    Args:
        stack: Any `Stack`.
        x: Input, (b, l, d).

    Returns:
        By number of the layer; layers whose mixer has no matrix are left out.
    """
    inputs: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs[index] = arguments[0]

        return hook

    hooks = [block.mixer.register_forward_pre_hook(keep(index)) for index, block in enumerate(stack.blocks)]  # type: ignore[union-attr]
    try:
        stack(x)
    finally:
        for hook in hooks:
            hook.remove()
    mixers: list[Any] = [block.mixer for block in stack.blocks]
    return {
        index: mixers[index].mixing_matrix(seen)
        for index, seen in sorted(inputs.items())
        if getattr(mixers[index], "linear_in_x", False)
    }


def token_jacobian(mixer: nn.Module, x: Tensor, *, probes: int | None = None, seed: int = 0) -> Tensor:
    """How strongly each output depends on each input: the Frobenius norm of dy_t / dx_s, (b, l, l) with t first.

    Args:
        mixer: Any module (b, l, d) -> (b, l, e) whose rows do not see each other.
        x: Where to look, (b, l, d).
        probes: Estimate from so many random directions per position, l * probes backward passes instead of l * e; the
            square is estimated without bias, with a relative standard deviation of about sqrt(2 / probes) at most.
        seed: Of the directions.

    Raises:
        ValueError: if `probes` is below 1.
    """
    if probes is not None and probes < 1:
        raise ValueError(f"`probes` must be at least 1, got {probes}.")
    x = x.detach().requires_grad_()
    y = mixer(x)
    length, width = y.shape[1:]
    if probes is None:
        directions = torch.eye(width, dtype=y.dtype, device=y.device)
    else:
        directions = torch.randn(probes, width, generator=torch.Generator().manual_seed(seed)).to(y)
    rows = []
    for t in range(length):
        total = torch.zeros(x.shape[:2], dtype=y.dtype, device=y.device)
        for direction in directions:
            (dx,) = torch.autograd.grad((y[:, t] * direction).sum(), x, retain_graph=True)
            total = total + dx.square().sum(-1)
        rows.append((total / (probes or 1)).sqrt())
    return torch.stack(rows, dim=1)


def span_rank(matrix: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """Dimension of the space that the heads' matrices span: how many of them are no combination of others.

    Args:
        matrix: (b, h, l, l).
        tolerance: Singular values below this share of the largest count as zero.

    Returns:
        (b,) integers up to h.
    """
    values = torch.linalg.svdvals(matrix.flatten(2))
    return (values > tolerance * values[:, :1]).sum(-1)


def draw_matrix(matrix: Tensor, title: str = "", *, heads: int = 8, floor: float = 1e-4) -> Figure:
    """Picture of a layer's matrices: one panel per head, rows are outputs, colours the logarithm of the magnitude.

    Args:
        matrix: (h, l, l) or (l, l).
        title: Above the panels.
        heads: Largest number of panels; the first heads are shown.
        floor: Magnitudes below this share of the largest are drawn like zero.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: if the matrix has another number of dimensions.
        ImportError: if matplotlib is not installed.
    """
    if matrix.dim() not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"`matrix` must be (h, l, l) or (l, l), got shape {tuple(matrix.shape)}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'omnissm[plot]'.") from error
    panels = (matrix if matrix.dim() == 3 else matrix[None]).detach().abs().double().cpu()[:heads]
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.6 * rows + 0.4), layout="constrained")
    for index, panel in enumerate(panels):
        largest = panel.max().clamp(min=torch.finfo(panel.dtype).tiny)
        axes = figure.add_subplot(rows, columns, index + 1)
        shades = (panel / largest).clamp(min=floor).log10()
        picture = axes.imshow(shades.numpy(), vmin=math.log10(floor), vmax=0, cmap="viridis")
        axes.set(title=f"head {index}" if len(panels) > 1 else "", xlabel="input s", ylabel="output t")
    figure.colorbar(picture, ax=figure.axes, label="log10 of magnitude / largest")
    figure.suptitle(title)
    return figure


__all__ = ["draw_matrix", "mixing_matrices", "span_rank", "token_jacobian"]
