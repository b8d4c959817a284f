"""Distillation of attention into state-space models: losses in three stages, and taking over an attention's maps.

1. `matrix_loss`: the mixing matrices of one layer, on the teacher's inputs;
2. `hidden_loss`: the outputs of one block;
3. `logit_loss`: the whole model's predictions.

Bick, Li, Xing, Kolter & Gu (2024), "Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic
Models" (MOHAWK).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixers import Attention, DiscreteMamba2


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


@torch.no_grad()
def transplant(attention: Attention, student: DiscreteMamba2) -> None:
    """Give a discrete Mamba-2 the maps of an attention: values as x, keys as B, scaled queries as C, and out_proj.

    The student starts as linear attention: its convolution passes inputs on, its gate is open and D is 0. Decays start
    at 1 where in_proj has a bias, else at 1/2. Rotations of positions are left out.

    Args:
        attention: Without convolution and MLP slice.
        student: With as many heads, as wide, and `d_state` the width of the keys; it is changed in place.

    Raises:
        ValueError: if sizes do not fit; the message names them.
    """
    heads, width = attention.nheads, attention.headdim
    wanted = {"d_model": attention.d_model, "nheads": heads, "headdim": width, "d_state": width, "ngroups": heads}
    for name, size in wanted.items():
        if getattr(student, name) != size:
            raise ValueError(f"the student must have {name}={size} as the attention has, got {getattr(student, name)}.")
    if attention.conv1d is not None or attention.mlp_dim:
        raise ValueError("expected an attention without convolution and MLP slice, got one with d_conv or mlp_dim.")
    for name in ("in_proj", "out_proj"):
        if getattr(attention, name).bias is not None and getattr(student, name).bias is None:
            raise ValueError(f"the attention has a bias in {name}; build the student with bias=True.")
    student.attention_init_()
    counts = [heads, attention.kv_heads, attention.kv_heads]

    def maps(tensor: Tensor) -> Tensor:
        """Rows of x, B and C from those of q, k and v."""
        q, k, v = tensor.unflatten(0, (-1, width)).split(counts)
        k, v = (part.repeat_interleave(heads // attention.kv_heads, dim=0) for part in (k, v))
        return torch.cat([v, k, q * attention.scale]).flatten(0, 1)

    rows = student.splits[0]
    student.in_proj.weight[:rows] = maps(attention.in_proj.weight)
    student.in_proj.weight[-heads:] = 0
    if student.in_proj.bias is not None:
        bias = attention.in_proj.bias
        student.in_proj.bias[:rows] = 0 if bias is None else maps(bias)
        student.in_proj.bias[-heads:] = -30.0  # softplus(-30) = 1e-13
    student.out_proj.weight.copy_(attention.out_proj.weight)
    if student.out_proj.bias is not None:
        bias = attention.out_proj.bias
        student.out_proj.bias[:] = 0 if bias is None else bias


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher must agree in shape, got {shapes}.")
