"""Losses and sums of language models over bases.

Cross entropy is computed in blocks of positions from what the head reads, so that no (l, vocabulary) tensor of a long
sequence exists; its gradient recomputes the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 65_536
IGNORE = -100


def next_base_targets(tokens: Tensor, mask: Tensor | None, seq_idx: Tensor | None, is_base: Tensor) -> Tensor:
    """What each position is asked for: the next id of its sequence where that is A, C, G or T, else -100.

    Args:
        tokens: Ids, (b, l).
        mask: True at real positions, (b, l).
        seq_idx: Which packed sequence a position belongs to, (b, l).
        is_base: (vocab_size,) bool.

    Returns:
        (b, l) int64; the last column is -100.
    """
    following = tokens[:, 1:]
    asked = is_base[following]
    if mask is not None:
        asked = asked & mask[:, 1:] & mask[:, :-1]
    if seq_idx is not None:
        asked = asked & (seq_idx[:, 1:] == seq_idx[:, :-1])
    return F.pad(torch.where(asked, following, IGNORE), (0, 1), value=IGNORE)


def blocked_cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, *, block: int = BLOCK
) -> Tensor:
    """Cross entropy of every position in nats, float32; 0 where the target is -100.

    Args:
        hidden: What the head reads, (b, l, d).
        head: Maps (n, d) to logits (n, V), without chance.
        targets: Ids, (b, l) int64.
        block: Positions at a time.
    """

    def one(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(part).float(), wanted, reduction="none", ignore_index=IGNORE)

    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    if len(wanted) <= block:
        return one(flat, wanted).view_as(targets)
    pairs = zip(flat.split(block), wanted.split(block))
    losses = [checkpoint(one, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.cat(losses).view_as(targets)


def bits(nats: float) -> float:
    """Nats in bits; perplexity is 2 ** bits."""
    return nats / math.log(2)
