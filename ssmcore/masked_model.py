"""A masked language model around a stack that sees both directions, in the layout of Hydra's BERT.

Hwang, Lahoti, Dao & Gu (2024), section 5; embeddings and head are those of Devlin et al. (2019), without positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import NormPosition, Stack
from .patterns import Layer


class MaskedModel(nn.Module):
    """Symbol and segment embeddings, layer norm, `Stack`, and a head that scores the symbols of all positions.

        x = norm(word + segment);   x = stack(x);   logits = norm(gelu(dense(x))) word^T + bias

    Args:
        d_model: Width.
        layers: As for `Stack`.
        vocab_size: Number of symbols.
        segments: Number of segment types.
        mixer: As for `Stack`.
        mixer_options: As for `Stack`.
        norm_position: "post" or "pre".
        eps: Of the blocks' layer norms.
        embedding_eps: Of the embedding's layer norm, and of the last one of a stack with norms in front.
        head_eps: Of the head's layer norm.
        dropout: Of the embeddings.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        d_model: int,
        layers: str | int | Sequence[Layer],
        *,
        vocab_size: int,
        segments: int = 2,
        mixer: str | None = None,
        mixer_options: Mapping[str, Any] | None = None,
        norm_position: NormPosition = "post",
        eps: float = 1e-5,
        embedding_eps: float = 1e-12,
        head_eps: float = 1e-12,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.vocab_size = d_model, vocab_size
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.segment = nn.Embedding(segments, d_model, **factory)
        self.embedding_norm = nn.LayerNorm(d_model, eps=embedding_eps, **factory)
        self.dropout = nn.Dropout(dropout)
        self.stack = Stack(
            d_model,
            layers,
            mixer=mixer,
            mixer_options=mixer_options,
            norm="layer",
            norm_position=norm_position,
            eps=eps,
            residual_in_fp32=False,
            **factory,
        )
        if isinstance(self.stack.norm, nn.LayerNorm):
            self.stack.norm.eps = embedding_eps
        self.dense = nn.Linear(d_model, d_model, **factory)
        self.head_norm = nn.LayerNorm(d_model, eps=head_eps, **factory)
        self.head = nn.Linear(d_model, vocab_size, **factory)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor, *, segment: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Scores of all symbols.

        Args:
            x: Symbols, (b, l).
            segment: Segment types, (b, l); None: all 0.
            mask: True at real symbols, (b, l).

        Returns:
            (b, l, vocab_size).
        """
        embedded = self.embedding(x) + self.segment(torch.zeros_like(x) if segment is None else segment)
        arguments = {} if mask is None else {"mask": mask}
        y = self.stack(self.dropout(self.embedding_norm(embedded)), **arguments)
        return self.head(self.head_norm(F.gelu(self.dense(y))))
