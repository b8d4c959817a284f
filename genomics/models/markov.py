"""Interpolated Markov models of DNA: the classical baseline, with exact log-probabilities and no training loop.

The probability of base x after the k bases c = c_1 .. c_k is mixed with that of the shorter context (Jelinek-Mercer
interpolation with a weight that grows with the count, as in GLIMMER):

    P_k(x | c) = (n(c, x) + s P_{k-1}(x | c_2 .. c_k)) / (n(c) + s),        P_{-1} = 1/4
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..sequence import Sequence, Vocabulary, encode, reverse_complement
from ..sequence import vocabulary as find_vocabulary

_CODE = np.full(8, 4, np.int64)  # ids of the vocabulary "acgt" to 0..3, all else to 4
_CODE[4:8] = np.arange(4)


class MarkovModel(nn.Module):
    """Interpolated Markov model of order k over A, C, G, T.

    Args:
        order: Bases of context, 0 to 12; 4 ** (order + 1) numbers are kept.
        strength: Weight s of the shorter context, in counts.
        vocabulary: Ids that `log_prob` reads: "acgt", "byte" or "char".

    Attributes:
        counts: (4 ** (order + 1),) float64: how often each word of order + 1 bases was seen.

    Raises:
        ValueError: for an order outside 0..12 or a strength that is not positive.
    """

    family = "markov"
    is_causal = True
    strands = "one"
    max_length: int | None = None
    bos = False
    counts: Tensor
    table: Tensor

    def __init__(self, order: int = 7, strength: float = 100.0, vocabulary: str = "acgt") -> None:
        super().__init__()
        if not 0 <= order <= 12:
            raise ValueError(f"expected an order from 0 to 12, got {order}")
        if strength <= 0:
            raise ValueError(f"expected a positive strength, got {strength}")
        self.order, self.strength = order, strength
        self.vocabulary = vocabulary
        self.words: Vocabulary = find_vocabulary(vocabulary)
        self.config: dict[str, Any] = {"order": order, "strength": strength, "vocabulary": vocabulary}
        self.register_buffer("counts", torch.zeros(4 ** (order + 1), dtype=torch.float64))
        # Log-probabilities of all contexts of 0..order bases, the shorter ones first; made from the counts when needed.
        self.register_buffer("table", torch.empty(0), persistent=False)

    def fit(self, sequences: Iterable[Sequence], *, both_strands: bool = True) -> MarkovModel:
        """Count words, in addition to those counted before.

        Args:
            sequences: DNA; words with another letter than A, C, G, T do not count.
            both_strands: Count the reverse complements as well.

        Returns:
            The model itself.
        """
        total = np.zeros(len(self.counts))
        for sequence in sequences:
            for strand in (sequence, reverse_complement(sequence)) if both_strands else (sequence,):
                words = _words(_CODE[encode(strand, "acgt")], self.order + 1)
                total += np.bincount(words[words >= 0], minlength=len(total))
        self.counts += torch.from_numpy(total).to(self.counts.device)
        self.table = torch.empty(0)
        return self

    def log_table(self) -> Tensor:
        """Natural log-probabilities, order 0 first, float32 of shape (sum of 4 ** (k + 1) for k = 0..order,).

        The entry of context c (its bases read as a number in base 4) and next base x at order k lies at
        (4 ** (k + 1) - 4) / 3 + 4 c + x.
        """
        if self.table.numel():
            return self.table
        counts = self.counts.reshape(-1, 4)
        by_order = [counts]
        for _ in range(self.order):
            by_order.append(by_order[-1].reshape(4, -1, 4).sum(dim=0))
        lower = torch.full((1, 4), 0.25, dtype=torch.float64, device=counts.device)
        tables = []
        for n in reversed(by_order):
            prior = lower.repeat(len(n) // len(lower), 1)
            lower = (n + self.strength * prior) / (n.sum(dim=1, keepdim=True) + self.strength)
            tables.append(lower.log().flatten())
        self.table = torch.cat(tables).float()
        return self.table

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: (b, l) ids.
            mask: (b, l) bool, ignored: the model looks back only.

        Returns:
            (b, l, V) float32 log-probabilities after each position; -inf for ids other than the four bases.
        """
        codes = self._codes(tokens)
        start = self._start(codes)[..., None] + torch.arange(4, device=tokens.device)
        logits = torch.full((*tokens.shape, self.words.size), float("-inf"), device=tokens.device)
        bases = torch.as_tensor(self.words.bases, device=tokens.device)
        logits[..., bases] = self.log_table()[start]
        return logits

    def log_prob(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-probability of each token given those before it; that of the first has no context.

        Args:
            tokens: (b, l) ids.
            mask: (b, l) bool, ignored: the model looks back only.

        Returns:
            (b, l) float32 in nats; 0 at tokens other than A, C, G, T.
        """
        codes = self._codes(tokens)
        first = torch.full_like(codes[:, :1], 4)
        start = self._start(torch.cat([first, codes[:, :-1]], dim=1))
        known = codes < 4
        return torch.where(known, self.log_table()[start + torch.where(known, codes, 0)], 0.0)

    def _codes(self, tokens: Tensor) -> Tensor:
        lookup = torch.as_tensor(_CODE[encode(self.words.decoder, "acgt")], device=tokens.device)
        return lookup[tokens]

    def _start(self, codes: Tensor) -> Tensor:
        """(b, l) place in the table of the longest context, up to `order` known bases, that ends at each position."""
        context, length = torch.zeros_like(codes), torch.zeros_like(codes)
        alive = torch.ones_like(codes, dtype=torch.bool)
        shifted = codes
        for k in range(self.order):
            alive = alive & (shifted < 4)
            context = torch.where(alive, context + shifted * 4**k, context)
            length = length + alive
            shifted = torch.cat([torch.full_like(codes[:, :1], 4), shifted[:, :-1]], dim=1)
        return (4 ** (length + 1) - 4) // 3 + 4 * context


def _words(codes: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Every word of `length` codes as a number in base 4, -1 where one of them is unknown."""
    if len(codes) < length:
        return np.empty(0, np.int64)
    count = len(codes) - length + 1
    words, broken = np.zeros(count, np.int64), np.zeros(count, bool)
    for k in range(length):
        part = codes[k : k + count]
        words = 4 * words + part
        broken |= part > 3
    return np.where(broken, -1, words)
