"""Which attention heads a model needs: how much worse it does without each of them.

Bick, Xing & Gu (2025), "Understanding the Skill Gap in Recurrent Language Models: The Role of the Gather-and-Aggregate
Mechanism": few heads carry what state-space models lack, and ablation finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .surgery import attention_layers


@torch.no_grad()
def head_scores(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Increase of a loss when a head's output is zeroed, for every attention head of a model.

    Args:
        model: With `Attention` modules, in evaluation mode.
        loss: Called with the model; a number to be small, such as the loss on retrieval tasks
            (`omnissm.ssmcore.analysis.key_value_recall`) or on held-out data. It is called once per head and once more.

    Returns:
        Scores (h,) float64 by name of the layer; large ones are those to keep.

    Raises:
        ValueError: if the model has no attention.
    """
    found = attention_layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention heads to score.")
    whole = float(loss(model))
    scores = {}
    for name, attention in found.items():
        without = []
        for head in range(attention.nheads):
            channels = slice(head * attention.headdim, (head + 1) * attention.headdim)

            def silence(_: nn.Module, inputs: tuple[Any, ...], channels: slice = channels) -> tuple[Tensor]:
                y = inputs[0].clone()
                y[..., channels] = 0
                return (y,)

            handle = attention.out_proj.register_forward_pre_hook(silence)
            try:
                without.append(float(loss(model)) - whole)
            finally:
                handle.remove()
        scores[name] = torch.tensor(without, dtype=torch.float64)
    return scores


def top_heads(scores: Mapping[str, Tensor], count: int) -> dict[str, tuple[int, ...]]:
    """The heads with the highest scores over all layers, for `convert(model, keep=...)`.

    Args:
        scores: From `head_scores`.
        count: How many.

    Raises:
        ValueError: if there are not as many heads.
    """
    ranked = sorted(
        ((float(score), name, head) for name, own in scores.items() for head, score in enumerate(own)),
        key=lambda entry: -entry[0],
    )
    if not 0 <= count <= len(ranked):
        raise ValueError(f"`count` must lie in 0 to {len(ranked)}, the number of heads, got {count}.")
    kept: dict[str, list[int]] = {}
    for _, name, head in ranked[:count]:
        kept.setdefault(name, []).append(head)
    return {name: tuple(sorted(kept[name])) for name in scores if name in kept}


__all__ = ["head_scores", "top_heads"]
