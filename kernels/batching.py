"""Batching rules for custom ops: a dimension mapped by `torch.func.vmap` joins the batch dimension."""

from __future__ import annotations

from torch import Tensor


def fold(tensor: Tensor | None, mapped: int | None, count: int) -> Tensor | None:
    """Merge a mapped dimension into dim 0: (b, ...) mapped `count` times -> (count * b, ...).

    Args:
        tensor: Tensor as the batching rule gets it, None if absent.
        mapped: Position of the mapped dimension, None if the tensor is the same for all.
        count: Size of the mapped dimension.
    """
    if tensor is None:
        return None
    if mapped is None:
        tensor = tensor.expand(count, *tensor.shape)
    else:
        tensor = tensor.movedim(mapped, 0)
    return tensor.flatten(0, 1)


def unfold(tensor: Tensor, count: int) -> Tensor:
    """Undo `fold`: (count * b, ...) -> (count, b, ...)."""
    return tensor.unflatten(0, (count, -1))
