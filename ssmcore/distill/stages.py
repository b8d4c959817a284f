"""The three stages of distillation on whole models: what teacher and student are compared in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..mixers import Attention, Bidirectional
from .losses import hidden_loss, logit_loss
from .surgery import HybridAttention, attention_layers

Stage = Literal["matrix", "hidden", "logits"]
"""What a student is fitted to: mixing matrices, hidden states of the blocks, or logits of the whole."""
STAGES: tuple[Stage, ...] = get_args(Stage)
"""The stages in the order in which they are trained."""


def stage_loss(
    stage: Stage,
    teacher: nn.Module,
    student: nn.Module,
    run: Callable[[nn.Module], Tensor],
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Loss of one stage on one batch.

        matrix:  Frobenius distance of the mixing matrices of each replaced layer, on the teacher's inputs
        hidden:  Euclidean distance of the outputs of each replaced layer, on the teacher's inputs
        logits:  cross-entropy of the student's predictions to the teacher's

    Args:
        stage: "matrix", "hidden" or "logits".
        teacher: Gets no gradient.
        student: From `convert(teacher, ...)`.
        run: Gives a model the batch and returns its logits, (b, ..., n).
        temperature: Of the third stage.
        mask: True at positions that count, (b, l); the first stage counts all, so that rows padded on the right add
            rows of no meaning to it, and those padded on the left do not suit it. It takes packed sequences for one.

    Returns:
        A number, the mean over replaced layers.

    Raises:
        ValueError: if the stage is unknown, or no layer is replaced.
    """
    if stage not in STAGES:
        raise ValueError(f"`stage` must be one of {', '.join(map(repr, STAGES))}, got {stage!r}.")
    if stage == "logits":
        with torch.no_grad():
            wanted = run(teacher)
        got = run(student)
        if got.dim() == 2:  # one prediction per row, as of images
            got, wanted, mask = got[:, None], wanted[:, None], None
        return logit_loss(got, wanted, temperature=temperature, mask=mask)
    seen: dict[str, tuple[Tensor, dict[str, Any], Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> None:
            seen[name] = (inputs[0], options, output)

        return hook

    layers = attention_layers(teacher)
    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            run(teacher)
    finally:
        for handle in handles:
            handle.remove()
    losses = []
    for name, (x, options, y) in seen.items():
        mixer: Any = student.get_submodule(name)
        if isinstance(mixer, Attention):
            continue
        if stage == "hidden":
            losses.append(hidden_loss(mixer(x, **options), y, mask))
            continue
        with torch.no_grad():
            matrix = layers[name].mixing_matrix(x).matrix
        heads = list(mixer.replaced) if isinstance(mixer, HybridAttention) else slice(None)
        got = _matrix(mixer.second if isinstance(mixer, HybridAttention) else mixer, x)
        losses.append(torch.linalg.matrix_norm(got - matrix[:, heads].to(got.dtype)).mean())
    if not losses:
        raise ValueError("the student has as much attention as the teacher; convert(teacher) makes one that has less.")
    return torch.stack(losses).mean()


def _matrix(mixer: Any, x: Tensor) -> Tensor:
    """Mixing matrix per head, of two directions their sum."""
    matrix = mixer.mixing_matrix(x).matrix
    if isinstance(mixer, Bidirectional):
        ahead, back = matrix.chunk(2, dim=1)
        return ahead + back
    return matrix


__all__ = ["STAGES", "Stage", "stage_loss"]
