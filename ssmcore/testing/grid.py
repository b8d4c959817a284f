"""The contract of grid mixers, (b, i, j, d) -> (b, i, j, d)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...kernels.testing import relative_error
from .common import check_declarations, normal, require

BATCH, ROWS, COLUMNS = 2, 3, 6


def check_shape_and_dtype(mixer: nn.Module) -> None:
    """Input shape and dtype come back, for one cell, one row, one column and a whole grid."""
    for rows, columns in ((1, 1), (1, COLUMNS), (ROWS, 1), (ROWS, COLUMNS)):
        x = grid_input(mixer, rows, columns)
        y = mixer(x)
        require(y.shape == x.shape, f"a grid {tuple(x.shape)} came back as {tuple(y.shape)}")
        require(y.dtype == x.dtype, f"{x.dtype} came back as {y.dtype}")


def check_causal(mixer: nn.Module) -> None:
    """If the mixer calls itself causal, no output depends on a later column."""
    if not getattr(mixer, "causal", False):
        return
    for column in range(COLUMNS - 1):
        x = grid_input(mixer).requires_grad_()
        (dx,) = torch.autograd.grad(mixer(x)[:, :, : column + 1].sum(), x)
        require(not dx[:, :, column + 1 :].any(), f"columns 0 to {column} of the output depend on later columns")
        require(bool(dx[:, :, : column + 1].any()), f"columns 0 to {column} of the output depend on no input")


def check_gradients(mixer: nn.Module) -> None:
    """Every parameter and the input get a finite gradient that is not all zero."""
    x = grid_input(mixer).requires_grad_()
    names = [name for name, p in mixer.named_parameters() if p.requires_grad]
    leaves = [x, *(p for p in mixer.parameters() if p.requires_grad)]
    weights = normal(x.shape, seed=1).to(x)
    gradients = torch.autograd.grad((mixer(x) * weights).sum(), leaves, allow_unused=True)
    for name, gradient in zip(["x", *names], gradients):
        if gradient is None:
            raise AssertionError(f"`{name}` gets no gradient")
        require(bool(gradient.isfinite().all()), f"the gradient of `{name}` is not finite")
        require(bool(gradient.any()), f"the gradient of `{name}` is zero")


def check_autocast(mixer: nn.Module) -> None:
    """Under bfloat16 autocast a long row stays within the rounding of single values: states are kept in float32."""
    x = grid_input(mixer, 2, 256)
    expected = mixer(x)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        got = mixer(x)
    error = relative_error(got, expected)
    require(error < 2e-2, f"bfloat16 autocast is off by {error:.1e}, allowed 2e-2")


def check_mask(mixer: nn.Module) -> None:
    """A mask of True changes nothing, and what a masked cell holds reaches no other cell."""
    x = grid_input(mixer)
    mask = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device)
    error = relative_error(mixer(x, mask=mask), mixer(x))
    require(error < 1e-6, f"a mask that is True everywhere changes the output by {error:.1e}")
    mask[0, 1, 2] = mask[1, 0, 0] = mask[1, :, 4] = False
    other = torch.where(mask[..., None], x, x + 5)
    first, second = mixer(x, mask=mask), mixer(other, mask=mask)
    error = relative_error(first[mask], second[mask])
    require(error < 1e-6, f"what masked cells hold reaches other cells and changes them by {error:.1e}")
    require(relative_error(first[mask], mixer(x)[mask]) > 1e-6, "the mask has no effect")


def check_batch(mixer: nn.Module) -> None:
    """Entries of a batch do not see each other."""
    x = grid_input(mixer)
    error = relative_error(torch.cat([mixer(part) for part in x.split(1)]), mixer(x))
    require(error < 1e-5, f"a batch differs from its entries by {error:.1e}")


def check_state_dict(mixer: nn.Module) -> None:
    """A state dict goes around: changed parameters give another output, loading gives the old one back."""
    x = grid_input(mixer)
    expected = mixer(x)
    kept = {name: value.clone() for name, value in mixer.state_dict().items()}
    try:
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1)
        require(not torch.equal(mixer(x), expected), "the output does not depend on the parameters")
    finally:
        mixer.load_state_dict(kept, strict=True)
    require(torch.equal(mixer(x), expected), "loading the state dict does not restore the output")


GRID_CHECKS: tuple[Callable[[nn.Module], None], ...] = (
    check_shape_and_dtype,
    check_causal,
    check_gradients,
    check_autocast,
    check_mask,
    check_batch,
    check_state_dict,
    check_declarations,
)
"""What every mixer of grids fulfils; each check takes the mixer and raises AssertionError."""


def grid_input(mixer: nn.Module, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Normal numbers (b, i, j, d) in the dtype and on the device of the mixer."""
    like = next(mixer.parameters())
    return normal((BATCH, rows, columns, int(mixer.d_model)), seed=0).to(like)  # type: ignore[arg-type]
