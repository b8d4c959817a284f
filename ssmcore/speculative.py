"""Decoding with a small model that drafts trees of symbols, which the large model then checks in one pass each.

    found = speculate(model, draft, prompt, 200, widths=(3, 2, 1))
    found.ids, found.passes, found.accepted

Without temperature the symbols are those of `generate`; with one they are distributed as its are. Trees: Miao et al.
(2024), "SpecInfer"; on state-space models: Wu et al. (2025), "STree". Candidates drawn without replacement: Jeon et al.
(2024), "Recursive Speculative Decoding".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import TokenTree, token_tree
from .cache import accept, allocate, verify
from .generate import check_options, probabilities, read_prompt, sample


class Speculation(NamedTuple):
    """What `speculate` returns.

    Attributes:
        ids: The new symbols, (b, max_new), shorter if all rows end before.
        passes: Passes of the large model after the prompt, each over one tree.
        accepted: Drafted symbols accepted per pass and row, from 0 to the number of widths.
    """

    ids: Tensor
    passes: int
    accepted: float


@torch.no_grad()
def speculate(
    model: nn.Module,
    draft: nn.Module,
    ids: Tensor,
    max_new: int,
    *,
    widths: Sequence[int] = (3, 2, 1),
    mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    pad: int = 0,
    generator: torch.Generator | None = None,
) -> Speculation:
    """Go on from prompts as `generate` does, several symbols per pass of the model.

    Args:
        model: With `prefill`, `verify` and `init_state`, whose outputs are logits.
        draft: Small model over the same symbols, with `prefill`, `step` and `init_state`.
        ids: Prompts, (b, l) integers.
        max_new: Symbols to add.
        widths: Candidates for each of the next symbols: (3, 2, 1) makes a tree of 1 + 3 + 6 + 6 nodes.
        mask: True at the prompts' real symbols, (b, l).
        temperature: Divides the logits of both models; 0 takes the largest.
        top_k: Draw from the k most probable symbols.
        top_p: Draw from the fewest most probable symbols that together have this probability.
        stop: Symbols that end a row.
        pad: Symbol that fills rows that have ended.
        generator: Source of random numbers, on the device of the model.

    Raises:
        ValueError: if an option is out of range, or the models have different numbers of symbols.
        TypeError: if the model takes no trees.
    """
    check_options(ids, mask, max_new, None, temperature, top_k, top_p)
    if not widths or min(widths) < 1:
        raise ValueError(f"`widths` must be numbers of candidates of at least 1, such as (3, 2, 1); got {widths}.")
    choice: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    batch, device, depth = ids.shape[0], ids.device, len(widths)
    tree, room = _tree(widths, device), ids.shape[1] + max_new + 2 * (depth + 1)
    logits, state = read_prompt(model, ids, allocate(model, batch, slots=room, device=device), mask, None)
    guesses, guess_state = read_prompt(draft, ids, allocate(draft, batch, slots=room, device=device), mask, None)
    if logits.shape != guesses.shape:
        raise ValueError(f"model and draft must know as many symbols, got {logits.shape[1]} and {guesses.shape[1]}.")
    if max(widths) > logits.shape[1]:
        raise ValueError(f"`widths` must be at most the {logits.shape[1]} symbols, got {max(widths)}.")
    ends = torch.tensor(list(stop), dtype=torch.int64, device=device)
    found = torch.full((batch, max_new + depth + 1), pad, dtype=torch.int64, device=device)
    length, passes, taken = torch.zeros(batch, dtype=torch.int64, device=device), 0, 0.0
    # New symbols of this round, of which the draft has seen none and the model all but the last.
    fresh, count = sample(logits, **choice, generator=generator)[:, None], torch.ones_like(length)
    running = torch.ones_like(length, dtype=torch.bool)
    while max_new:
        place = torch.arange(fresh.shape[1], device=device)
        ending = torch.isin(fresh, ends) & (place < count[:, None])
        stopped = ending.any(1)
        count = torch.where(stopped, ending.int().argmax(1) + 1, count)
        kept = (place < count[:, None]) & running[:, None]
        columns = torch.where(kept, length[:, None] + place, found.shape[1] - 1)
        found.scatter_(1, columns, torch.where(kept, fresh, pad))
        length = length + count * running
        running = running & ~stopped & (length < max_new)
        if not running.any():
            break
        seen = (place < count[:, None]) & running[:, None]
        guesses, guess_state = read_prompt(draft, fresh, guess_state, seen, None)
        last = fresh.gather(1, count[:, None] - 1)
        symbols, shares = _grow(draft, last, guesses, guess_state, widths, choice, generator)
        logits, seen_tree = verify(model, symbols, state, tree)
        if temperature == 0:
            node, following = _walk_greedily(logits, symbols, widths)
        else:
            chances = probabilities(logits.flatten(0, 1), **choice).unflatten(0, (batch, -1))
            node, following = _walk(chances, symbols, shares, widths, generator)
        state = accept(seen_tree, torch.where(running, node, -1))
        path, count = tree.path(node)
        fresh = torch.cat([symbols.gather(1, path), following[:, None]], dim=1)[:, 1:]
        fresh = fresh.scatter(1, count[:, None] - 1, following[:, None])
        passes, taken = passes + 1, taken + (count - 1)[running].float().mean().item()
    return Speculation(found[:, : min(max_new, int(length.max()))], passes, taken / max(passes, 1))


def _tree(widths: Sequence[int], device: torch.device) -> TokenTree:
    """The last symbol as root, and levels of candidates, each node's side by side."""
    parents, level = [-1], [0]
    for width in widths:
        first = len(parents)
        parents += [node for node in level for _ in range(width)]
        level = list(range(first, len(parents)))
    return token_tree(torch.tensor(parents, device=device))


def _grow(
    draft: Any,
    root: Tensor,
    logits: Tensor,
    state: Any,
    widths: Sequence[int],
    choice: dict[str, Any],
    generator: torch.Generator | None,
) -> tuple[Tensor, list[Tensor]]:
    """Symbols of all nodes, (b, l), and for each level the probabilities they were drawn from, (b, nodes, n)."""
    batch, nodes = root.shape[0], 1
    symbols, shares = [root], []
    for level, width in enumerate(widths):
        if choice["temperature"] == 0:
            drawn = logits.topk(width).indices
        else:
            share = probabilities(logits, **choice)
            # The largest of p / e with exponential e are draws one after another without replacement.
            race = share / torch.empty_like(share).exponential_(generator=generator)
            drawn = race.topk(width).indices
            shares.append(share.unflatten(0, (batch, nodes)))
        symbols.append(drawn.view(batch, nodes * width))
        nodes *= width
        if level + 1 < len(widths):
            state = state.select(torch.arange(len(drawn), device=root.device).repeat_interleave(width))
            logits, state = draft.step(drawn.flatten(), state)
    return torch.cat(symbols, dim=1), shares


def _children(node: Tensor, widths: Sequence[int], level: int) -> Tensor:
    """First child of nodes (b,) that lie `level` below the root."""
    sizes = [math.prod(widths[:depth]) for depth in range(len(widths) + 1)]
    return sum(sizes[: level + 1]) + (node - sum(sizes[:level])) * widths[level]


def _walk_greedily(logits: Tensor, symbols: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The deepest node (b,) whose path the model would have taken, and the symbol that it takes next."""
    best = logits.float().argmax(-1)
    rows = torch.arange(len(symbols), device=symbols.device)
    node, walking = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    for level, width in enumerate(widths):
        first = torch.where(walking, _children(node, widths, level), 0)
        places = first[:, None] + torch.arange(width, device=symbols.device)
        same = symbols.gather(1, places) == best[rows, node][:, None]
        walking = walking & same.any(1)
        node = torch.where(walking, first + same.int().argmax(1), node)
    return node, best[rows, node]


def _walk(
    chances: Tensor, symbols: Tensor, shares: list[Tensor], widths: Sequence[int], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The deepest accepted node (b,) and the next symbol; together distributed as draws from the model.

    A candidate drawn from q is accepted with probability min(1, p / q); after a rejection p becomes the positive part
    of p - q, and q leaves the candidate out.
    """
    rows = torch.arange(len(symbols), device=symbols.device)
    node, walking = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    p, first_node = chances[rows, node].double(), 0
    for level, width in enumerate(widths):
        share = shares[level].double()
        q = share[rows, torch.where(walking, node - first_node, 0)]
        first = torch.where(walking, _children(node, widths, level), 0)
        taken = torch.zeros_like(walking)
        for place in range(width):
            candidate = symbols.gather(1, (first + place)[:, None])
            own, wanted = q.gather(1, candidate)[:, 0], p.gather(1, candidate)[:, 0]
            threshold = torch.rand(own.shape, dtype=own.dtype, device=own.device, generator=generator)
            asked = walking & ~taken & (own > 0)
            passed = asked & (threshold * own < wanted)
            node = torch.where(passed, first + place, node)
            rejected = (asked & ~passed)[:, None]
            rest = (p - q).clamp(min=0)
            total = rest.sum(1, keepdim=True)
            p = torch.where(rejected & (total > 0), rest / total.clamp(min=1e-300), p)
            q = torch.where(rejected, q.scatter(1, candidate, 0), q)
            q = q / q.sum(1, keepdim=True).clamp(min=1e-300)
            taken = taken | passed
        p = torch.where(taken[:, None], chances[rows, node].double(), p)
        walking, first_node = taken, first_node + share.shape[1]
    return node, torch.multinomial(p, 1, generator=generator)[:, 0]


__all__ = ["Speculation", "speculate"]
