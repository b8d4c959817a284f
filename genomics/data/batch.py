"""The batch that all genomic data modules deliver."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SequenceBatch(NamedTuple):
    """Tokenised sequences of one batch.

    Attributes:
        tokens: (b, l) int64, ids of the data module's vocabulary.
        mask: (b, l) bool, True at real positions and False at padding.
        labels: What a supervised task predicts: (b,) int64 classes, (b, k) float32 values or bits, or (b, l) int64
            targets of a masked or per-base task, -100 where there is none; for next-base training the true ids where
            some that are read were exchanged, else None.
        seq_idx: (b, l) int64 number of the piece that a position belongs to, where rows are packed; else None.
        weight: (b, l) float32 weight of each position in the loss; None counts all real positions alike.
    """

    tokens: Tensor
    mask: Tensor
    labels: Tensor | None = None
    seq_idx: Tensor | None = None
    weight: Tensor | None = None
