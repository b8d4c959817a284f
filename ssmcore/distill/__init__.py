"""Distillation of attention into state-space models: surgery, which heads to keep, and losses in three stages.

    student = convert(teacher, keep=top_heads(head_scores(teacher, loss), 2))
    loss = stage_loss("matrix", teacher, student, lambda model: model(ids))

`omnissm.ssmcore.training.Distillation` is the Lightning task. Source: Bick, Li, Xing, Kolter & Gu (2024), "Transformers
to SSMs" (MOHAWK); Bick, Xing & Gu (2025) for hybrids that keep the heads that retrieve.
"""

from .heads import head_scores as head_scores
from .heads import top_heads as top_heads
from .losses import hidden_loss as hidden_loss
from .losses import logit_loss as logit_loss
from .losses import matrix_loss as matrix_loss
from .stages import STAGES as STAGES
from .stages import Stage as Stage
from .stages import stage_loss as stage_loss
from .surgery import HybridAttention as HybridAttention
from .surgery import attention_layers as attention_layers
from .surgery import convert as convert
from .surgery import replace_attention as replace_attention
from .surgery import select_heads as select_heads
from .surgery import state_space_of as state_space_of
from .surgery import transplant as transplant

__all__ = [
    "STAGES",
    "HybridAttention",
    "Stage",
    "attention_layers",
    "convert",
    "head_scores",
    "hidden_loss",
    "logit_loss",
    "matrix_loss",
    "replace_attention",
    "select_heads",
    "stage_loss",
    "state_space_of",
    "top_heads",
    "transplant",
]
