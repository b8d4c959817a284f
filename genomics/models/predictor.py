"""A head on any model of bases: pooled vectors of a sequence to values or classes.

Echo: a causal model sees the sequence twice and only the second copy is pooled, whose positions have seen everything;
with "strand" the second copy is the reverse complement. Ma et al. (2025), "HybriDNA", section on echo embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..sequence import vocabulary as read_vocabulary

Pool = Literal["mean", "max", "last", "none"]
Echo = Literal["none", "repeat", "strand"]


class SequencePredictor(nn.Module):
    """Backbone, pooling and a linear head.

    Args:
        model: Name of a model that gives vectors of bases.
        n_outputs: Values or classes predicted.
        model_args: Options of the model.
        pool: "mean", "max" or "last" (the last real position); "none" predicts at every position.
        echo: "none", "repeat" or "strand"; needs a causal model and doubles the length.
        dropout: Before the head.
        freeze: Train the head alone.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: for an unknown option, or an echo of a model that sees both directions.

    Attributes:
        backbone: The model.
    """

    supervised = True
    is_causal = False
    family = "predictor"
    backbone: Any
    complement: Tensor
    vocabulary: str
    vocab_size: int
    d_model: int
    max_length: int | None

    def __init__(
        self,
        model: str,
        n_outputs: int = 1,
        *,
        model_args: Mapping[str, Any] | None = None,
        pool: Pool = "mean",
        echo: Echo = "none",
        dropout: float = 0.0,
        freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        from . import create_model  # its table holds this class too

        super().__init__()
        for name, value, known in (("pool", pool, get_args(Pool)), ("echo", echo, get_args(Echo))):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        if n_outputs < 1:
            raise ValueError(f"expected n_outputs of at least 1, got {n_outputs}.")
        self.backbone = create_model(model, **(dict(model_args or {}) | {"device": device, "dtype": dtype}))
        if pool == "none" and echo == "strand":
            raise ValueError("at every position, the second copy must run the same way: use echo 'repeat', or none.")
        if echo != "none" and not self.backbone.is_causal:
            raise ValueError(f"an echo is for causal models; {model!r} sees both directions already.")
        self.config: dict[str, Any] = {
            "model": model,
            "n_outputs": n_outputs,
            "model_args": dict(self.backbone.config),
            "pool": pool,
            "echo": echo,
            "dropout": dropout,
            "freeze": freeze,
        }
        self.pool, self.echo, self.freeze = pool, echo, freeze
        inner = self.backbone
        self.strands, self.vocabulary, self.vocab_size, self.d_model = (
            inner.strands, inner.vocabulary, inner.vocab_size, inner.d_model
        )  # fmt: skip
        limit = inner.max_length
        self.max_length = limit // 2 if limit and echo != "none" else limit
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.d_model, n_outputs, device=device, dtype=dtype)
        words = read_vocabulary(self.vocabulary)
        complement = torch.arange(self.vocab_size, device=device)
        complement[: words.size] = torch.from_numpy(words.complement)
        self.register_buffer("complement", complement, persistent=False)
        if freeze:
            self.backbone.requires_grad_(False)
        elif inner.lm_head.weight is not inner.embeddings.weight:
            inner.lm_head.requires_grad_(False)  # not used here

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Predictions (b, n_outputs), or (b, l, n_outputs) without pooling, for ids (b, l).

        Args:
            tokens: Ids.
            mask: True at real positions, (b, l).
            seq_idx: None; rows are single sequences.

        Raises:
            ValueError: for packed rows, or sequences beyond the model's length.
        """
        if seq_idx is not None:
            raise ValueError("a supervised model takes one sequence per row; set pack: false in the data module.")
        if self.max_length is not None and tokens.shape[1] > self.max_length:
            raise ValueError(f"sequences of up to {self.max_length} positions fit this model, got {tokens.shape[1]}.")
        length, real = tokens.shape[1], mask
        if self.echo != "none":
            tokens, real = self._echoed(tokens, mask)
        hidden, _ = self.backbone.hidden(tokens, mask=real)
        if self.echo != "none":
            hidden = self._second(hidden, length, mask)
        sides = self.backbone.sides(hidden) if hasattr(self.backbone, "sides") else [hidden]
        masks = [mask, None if mask is None else mask.flip(1)]
        pooled = [pool(side, own, self.pool) for side, own in zip(sides, masks)]
        outputs = [self.head(self.dropout(vector.to(self.head.weight.dtype))) for vector in pooled]
        if self.pool == "none":  # the other strand's vectors run the other way
            outputs[1:] = [output.flip(1) for output in outputs[1:]]
        return torch.stack(outputs).mean(0)

    def _echoed(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both copies with a separator, (b, 2 l + 1), each row's real positions together."""
        words = read_vocabulary(self.vocabulary)
        batch, length = tokens.shape
        separator = words.eos if words.eos is not None else words.bos
        again = tokens if self.echo == "repeat" else self._other_strand(tokens, mask)
        between = tokens.new_full((batch, 1), separator)
        if mask is None:
            return torch.cat([tokens, between, again], dim=1), None
        index, real = self._places(length, mask)
        both = torch.cat([tokens, between, again], dim=1).gather(1, index)
        return both, real

    def _other_strand(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Reverse complement with padding where it was."""
        other = self.complement[tokens.flip(1)]
        if mask is None:
            return other
        # Real positions of the flipped row, moved back to where the mask has them.
        shift = mask.int().argmax(1) - mask.flip(1).int().argmax(1)
        place = (torch.arange(tokens.shape[1], device=tokens.device) - shift[:, None]) % tokens.shape[1]
        return other.gather(1, place)

    @staticmethod
    def _places(length: int, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Order that puts all real positions of both copies in front, (b, 2 l + 1), and which those are."""
        real = torch.cat([mask, torch.ones_like(mask[:, :1]), mask], dim=1)
        index = (~real).int().argsort(dim=1, stable=True)
        return index, real.gather(1, index)

    def _second(self, hidden: Tensor, length: int, mask: Tensor | None) -> Tensor:
        """Vectors of the second copy at the places of the first, (b, l, d)."""
        if mask is None:
            return hidden[:, length + 1 :]
        index, _ = self._places(length, mask)
        back = index.argsort(dim=1)
        return hidden.gather(1, back[..., None].expand(-1, -1, hidden.shape[2]))[:, length + 1 :]


def other_strand(tokens: Tensor, vocabulary: str, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reverse complement of rows; padding comes to the other side, and a start id stays in front of the bases.

    Args:
        tokens: Ids, (b, l).
        vocabulary: Name of their vocabulary.
        mask: True at real positions, (b, l).

    Returns:
        Ids, mask, and the place that each of them was taken from, (b, l) each.
    """
    words, length = read_vocabulary(vocabulary), tokens.shape[1]
    complement = torch.from_numpy(words.complement).to(tokens.device)
    place = torch.arange(length, device=tokens.device)
    first = length - mask.sum(1, keepdim=True)  # real position, where padding was behind them
    behind_start = torch.where(place > first, length - place, torch.where(place == first, 0, length - 1 - place))
    order = torch.where(tokens[:, :1] == words.bos, behind_start, length - 1 - place)
    return complement[tokens].gather(1, order), mask.gather(1, order), order


def pool(hidden: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """One vector per row from the real positions, or those of all positions.

    Args:
        hidden: (b, l, d).
        mask: True at real positions, (b, l); None: all.
        how: "mean", "max", "last" or "none".

    Raises:
        ValueError: for another word.
    """
    if how not in get_args(Pool):
        raise ValueError(f"`pool` must be one of {', '.join(get_args(Pool))}, got {how!r}.")
    if how == "none":
        return hidden
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if how == "mean":
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    if how == "max":
        return hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)
    last = torch.where(mask, torch.arange(hidden.shape[1], device=hidden.device), 0).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
