"""The losses of distillation in three stages.

1. `matrix_loss`: the mixing matrices of one layer, on the teacher's inputs;
2. `hidden_loss`: the outputs of one layer;
3. `logit_loss`: the whole model's predictions.

Bick, Li, Xing, Kolter & Gu (2024), "Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic
Models" (MOHAWK).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def matrix_loss(student: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    """Frobenius distance between the mixing matrices of two mixers on the same inputs, mean over rows and heads.

    Args:
        student: Mixer with `mixing_matrix`.
        teacher: Mixer with as many heads; it gets no gradient.
        x: Inputs of the teacher, (b, l, d).

    Raises:
        ValueError: if the matrices differ in shape.
    """
    with torch.no_grad():
        wanted = teacher.mixing_matrix(x).matrix  # type: ignore[operator]
    got = student.mixing_matrix(x).matrix  # type: ignore[operator]
    if got.shape[1:] != wanted.shape[1:]:
        raise ValueError(
            f"expected matrices of one shape (b, h, l, l), got {tuple(got.shape)} of the student and "
            f"{tuple(wanted.shape)} of the teacher; give both as many heads."
        )
    return torch.linalg.matrix_norm(got - wanted.to(got.dtype)).mean()


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Euclidean distance of the outputs (b, l, d) of two blocks, mean over positions.

    Args:
        student: Outputs of the student.
        teacher: Those of the teacher, which get no gradient.
        mask: True at the positions that count, (b, l).

    Raises:
        ValueError: if shapes differ.
    """
    _same_shape(student, teacher)
    distance = torch.linalg.vector_norm(student - teacher.detach().to(student.dtype), dim=-1)
    return distance.mean() if mask is None else distance[mask].mean()


def logit_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of the student's predictions (b, l, v) to the teacher's, in nats per position.

    Args:
        student: Logits of the student.
        teacher: Those of the teacher, which get no gradient.
        temperature: Divides both.
        mask: True at the positions that count, (b, l).

    Raises:
        ValueError: if shapes differ or the temperature is not positive.
    """
    _same_shape(student, teacher)
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    wanted = (teacher.detach().float() / temperature).softmax(-1)
    entropy = -(wanted * F.log_softmax(student.float() / temperature, dim=-1)).sum(-1)
    return entropy.mean() if mask is None else entropy[mask].mean()


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher must agree in shape, got {shapes}.")


__all__ = ["hidden_loss", "logit_loss", "matrix_loss"]
