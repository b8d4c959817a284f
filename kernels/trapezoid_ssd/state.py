"""The state that `trapezoid_ssd` carries from one position to the next, and the rotation of keys and queries."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rotation = Literal["interleaved", "half"]


class TrapezoidState(NamedTuple):
    """What `trapezoid_ssd` needs of the past.

    Attributes:
        phi: Angles modulo 2 pi, (b, h, s).
        ssm: Matrix state, (b, h, p, n).
        k: Key of the last position, rotated by `phi`, (b, r, h, n).
        v: Input of the last position, before `x_rank`, (b, h, p).
    """

    phi: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


def pairs(tensor: Tensor, count: int, half: bool) -> tuple[Tensor, Tensor]:
    """First and second entries of the pairs that are turned, (..., s) each: (2i, 2i + 1), or (i, i + n // 2)."""
    if half:
        middle = tensor.shape[-1] // 2
        return tensor[..., :count], tensor[..., middle : middle + count]
    return tensor[..., : 2 * count : 2], tensor[..., 1 : 2 * count : 2]


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """Turn the first s pairs of the last dimension: (a, b) -> (a cos - b sin, a sin + b cos)."""
    count = cos.shape[-1]
    first, second = pairs(tensor, count, half)
    turned = first * cos - second * sin, first * sin + second * cos
    if half:
        middle = tensor.shape[-1] // 2
        rest = tensor[..., count:middle], tensor[..., middle + count :]
        return torch.cat([turned[0], rest[0], turned[1], rest[1]], dim=-1)
    return torch.cat([torch.stack(turned, dim=-1).flatten(-2), tensor[..., 2 * count :]], dim=-1)


def spin(gradient: Tensor, tensor: Tensor, count: int, half: bool) -> Tensor:
    """Derivative by the angle of a rotation that gave `tensor`, whose gradient is `gradient`: (..., n) -> (..., s)."""
    (da, db), (a, b) = pairs(gradient, count, half), pairs(tensor, count, half)
    return db * a - da * b
