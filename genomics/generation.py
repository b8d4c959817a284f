"""New sequences from a causal model: temperature, top-k and top-p sampling, reproducible for each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .likelihood import Scorer
from .sequence import decode, normalise


class Generated(NamedTuple):
    """A sampled continuation.

    Attributes:
        prompt: Number of its prompt.
        sequence: New bases, without the prompt.
        log_likelihood: Sum of the model's log-probabilities of the new bases, nats, before temperature and cuts.
    """

    prompt: int
    sequence: str
    log_likelihood: float


@torch.inference_mode()
def generate(
    scorer: Scorer,
    prompts: Sequence[str | bytes] = ("",),
    *,
    n: int = 1,
    length: int = 1000,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    restrict: bool = True,
    seed: int = 0,
) -> Iterator[Generated]:
    """Continue prompts; what a prompt gives depends on the seed and its number only.

    Args:
        scorer: A causal model.
        prompts: Bases to continue; "" starts from nothing, which needs a model with a start id.
        n: Continuations of each.
        length: New bases at most; fewer where the model says end of sequence.
        temperature: Above 1 is more random; 0 takes the most probable base.
        top_k: Sample among the k most probable only; 0 among all.
        top_p: Sample among the most probable that together have this share.
        restrict: Only A, C, G and T.
        seed: Of all samples.

    Raises:
        ValueError: for numbers that make no sense, or a model that is not causal.
    """
    if not scorer.is_causal:
        raise ValueError(f"{scorer.name} is a masked model and cannot generate")
    if n < 1 or length < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError("expected n and length of at least 1, temperature and top_k of at least 0, top_p in (0, 1]")
    texts = [normalise(prompt) for prompt in prompts]
    if not scorer.bos and not all(texts):
        raise ValueError(f"{scorer.name} has no start id; give a prompt of at least one base")
    # Prompts of one length share a batch without padding.
    for width in sorted({len(text) for text in texts}):
        rows = [(k, copy) for k, text in enumerate(texts) if len(text) == width for copy in range(n)]
        size = max(1, scorer.batch_tokens // (width + length + 1))
        for start in range(0, len(rows), size):
            yield from _batch(
                scorer, texts, rows[start : start + size], length, temperature, top_k, top_p, restrict, seed
            )


def _batch(
    scorer: Scorer,
    texts: Sequence[bytes],
    rows: Sequence[tuple[int, int]],
    length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    restrict: bool,
    seed: int,
) -> Iterator[Generated]:
    words = scorer.vocabulary
    draws = [np.random.default_rng((seed, k, copy)).random(length) for k, copy in rows]
    tokens, _ = scorer.tokens([texts[k] for k, _ in rows], bos=scorer.bos)
    follow = _Follower(scorer.model, tokens)
    allowed = torch.zeros(words.size, dtype=torch.bool, device=tokens.device)
    allowed[torch.as_tensor(words.bases, device=tokens.device)] = True
    if not restrict:
        allowed[:] = True
    new = np.full((len(rows), length), words.pad, np.int64)
    total = np.zeros(len(rows))
    alive = np.ones(len(rows), bool)
    for at in range(length):
        log_p = follow.logits[:, : words.size].float().log_softmax(-1)
        p = _weights(torch.where(allowed, log_p, float("-inf")), temperature, top_k, top_p).double().cpu().numpy()
        edges = p.cumsum(axis=1)
        picks = np.array([np.searchsorted(e, draw[at] * e[-1], side="right") for e, draw in zip(edges, draws)])
        picks = np.minimum(picks, words.size - 1)
        new[alive, at] = picks[alive]
        chosen = log_p.double().cpu().numpy()[np.arange(len(rows)), picks]
        ended = picks == (words.eos if words.eos is not None else -1)
        total += np.where(alive & ~ended, chosen, 0.0)
        alive &= ~ended
        if not alive.any():
            break
        if at < length - 1:
            follow.step(torch.from_numpy(picks).to(tokens.device))
    for (k, _), ids, value in zip(rows, new, total):
        kept = ids[ids != words.pad]
        yield Generated(k, decode(kept[kept != words.eos] if words.eos is not None else kept, words), float(value))


def _weights(log_p: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(b, V) shares to sample from."""
    if temperature == 0:
        return torch.nn.functional.one_hot(log_p.argmax(-1), log_p.shape[-1]).float()
    p = (log_p / temperature).softmax(-1)
    order = p.argsort(dim=-1, descending=True, stable=True)
    ranked = p.gather(-1, order)
    kept = ranked.cumsum(-1) - ranked < top_p
    if top_k:
        kept[:, top_k:] = False
    return torch.zeros_like(p).scatter(-1, order, torch.where(kept, ranked, 0.0))


class _Follower:
    """Logits of the next id: by the model's own steps where it has them, else by reading everything again."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.stepwise = hasattr(model, "prefill") and hasattr(model, "step")
        if self.stepwise:
            logits, self.state = model.prefill(tokens)
            self.logits = logits[:, -1]
        else:
            self.logits = model(tokens)[:, -1]

    def step(self, picks: Tensor) -> None:
        """Read one more id of each row."""
        if self.stepwise:
            self.logits, self.state = self.model.step(picks, self.state)
            return
        self.tokens = torch.cat([self.tokens, picks[:, None]], dim=1)
        self.logits = self.model(self.tokens)[:, -1]
