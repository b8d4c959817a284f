"""What custom ops need for torch's transforms: batching rules, and functions that work under `torch.func`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import BackendError


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


class FirstDerivative(torch.autograd.Function):
    """Base of the functions that compute a gradient in Triton and have no gradient of their own.

    Subclasses set `name` and `forward`. A function with a setup context of its own, unlike an autograd formula that is
    registered with a custom op, also works under `torch.func.grad`.
    """

    generate_vmap_rule = True
    name = "this op"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @classmethod
    def backward(cls, ctx: Any, *gradients: Tensor) -> Any:
        raise BackendError(f"{cls.name} has no second derivative in Triton; call it with backend='chunked'.")
