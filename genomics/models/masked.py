"""Bidirectional models of masked bases, Caduceus and hydra_dna, ordinary or equivariant to the strand.

An equivariant model holds the vectors of both strands. With R the reversal of length and channels, rc the reverse
complement of ids and c the permutation of ids to their complements:

    x_1 = stack(E[ids]),  x_2 = R(stack(E[rc(ids)]));   logits = x_1 W^T + reverse(stack(E[rc(ids)])) W[c]^T
    logits(rc(ids)) = reverse(logits(ids))[..., c]       for any weights

| name | mixer | width | layers | strands |
| --- | --- | --- | --- | --- |
| caduceus_ph_1k, caduceus_ps_1k | bidirectional Mamba | 118 | 4 | one, equivariant |
| caduceus_ph_131k, caduceus_ps_131k | bidirectional Mamba | 256 | 16 | one, equivariant |
| hydra_dna_tiny | Hydra | 64 | 2 | one |
| hydra_dna_small | Hydra | 256 | 8 | one |
| hydra_dna_ps_small | Hydra | 256 | 8 | equivariant |

Schiff et al. (2024), "Caduceus: Bi-Directional Equivariant Long-Range DNA Sequence Modeling"; the mixer of hydra_dna is
that of Hwang, Lahoti, Dao & Gu (2024), "Hydra".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...ssmcore import Stack
from ...ssmcore.chunking import Boundaries
from ...ssmcore.mixers import create_mixer
from ..sequence import vocabulary as read_vocabulary
from .hnet import Layer

Strands = Literal["one", "equivariant"]


class MaskedDNA(nn.Module):
    """Embedding, a stack that sees both directions, and a head tied to the embedding.

    Args:
        d_model: Width.
        n_layer: Number of layers, without MLPs.
        mixer: "mamba" (a scan from either end that share their projections) or "hydra".
        mixer_options: Its options.
        strands: "equivariant" shares all weights between the strands and makes predictions agree.
        swap_halves: Hand the vectors of one strand to the place of the other before every layer, as the fused kernels
            did that the published equivariant weights were trained with. A different function of the same weights.
        vocab_size: Number of ids; None: those of the vocabulary.
        vocabulary: Name of the vocabulary.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: for an unknown mixer or treatment of strands, or `swap_halves` with one strand.

    Attributes:
        is_causal, strands, max_length: What the verbs need to know about a model.
    """

    is_causal = False
    max_length: int | None = None
    bos = False
    family = "masked_dna"
    complement: Tensor

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        *,
        mixer: Literal["mamba", "hydra"] = "hydra",
        mixer_options: Mapping[str, Any] | None = None,
        strands: Strands = "one",
        swap_halves: bool = False,
        vocab_size: int | None = None,
        vocabulary: str = "char",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if strands not in ("one", "equivariant"):
            raise ValueError(f"`strands` must be 'one' or 'equivariant', got {strands!r}.")
        if swap_halves and strands == "one":
            raise ValueError("`swap_halves` needs strands='equivariant'.")
        if mixer not in ("mamba", "hydra"):
            raise ValueError(f"`mixer` must be 'mamba' or 'hydra', got {mixer!r}.")
        words = read_vocabulary(vocabulary)
        self.vocab_size = words.size if vocab_size is None else vocab_size
        if self.vocab_size < words.size:
            raise ValueError(f"vocabulary {vocabulary!r} has {words.size} ids, got vocab_size={vocab_size}.")
        self.config: dict[str, Any] = {
            "d_model": d_model,
            "n_layer": n_layer,
            "mixer": mixer,
            "mixer_options": dict(mixer_options or {}),
            "strands": strands,
            "swap_halves": swap_halves,
            "vocab_size": self.vocab_size,
            "vocabulary": vocabulary,
        }
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.strands, self.swap_halves, self.vocabulary = d_model, strands, swap_halves, vocabulary
        options = dict(mixer_options or {})
        if mixer == "mamba":
            options = {"mixer": "mamba", "mixer_options": options, "combine": "add", "tie": "projections"}
        name = "hydra" if mixer == "hydra" else "bidirectional"
        layers = [create_mixer(name, d_model, **options, **factory) for _ in range(n_layer)]
        self.embeddings = nn.Embedding(self.vocab_size, d_model, **factory)
        self.stack = Stack(d_model, layers, **factory)
        self.lm_head = nn.Linear(d_model, self.vocab_size, bias=False, **factory)
        self.lm_head.weight = self.embeddings.weight
        self.reset_parameters()
        complement = torch.arange(self.vocab_size, device=device)
        complement[: words.size] = torch.from_numpy(words.complement)
        self.register_buffer("complement", complement, persistent=False)

    def reset_parameters(self) -> None:
        """Embedding normal(0.02); what writes to the residual stream smaller by the root of the number of layers."""
        nn.init.normal_(self.embeddings.weight, std=0.02)
        for name, part in self.stack.named_modules():
            if name.endswith(".out_proj") and isinstance(part, nn.Linear):
                nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5))
                with torch.no_grad():
                    part.weight /= math.sqrt(len(self.stack.blocks))

    def no_decay_names(self) -> tuple[str, ...]:
        """Parameters that weight decay must leave alone."""
        return ("embeddings.weight",)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Logits of each id, given all others.

        Args:
            tokens: Ids, (b, l).
            mask: True at real positions, (b, l).
            seq_idx: Which packed sequence a position belongs to, (b, l) integers.

        Returns:
            (b, l, vocab_size).
        """
        return self.logits(self.hidden(tokens, mask=mask, seq_idx=seq_idx)[0])

    def hidden(
        self, tokens: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, list[Boundaries]]:
        """What the head reads, (b, l, d_model) or with both strands (b, l, 2 d_model), and no boundaries."""
        if self.strands == "one":
            return self.stack(self.embeddings(tokens), mask=mask, seq_idx=seq_idx), []
        both = torch.cat([tokens, reverse_complement(tokens, self.complement)])
        mask = None if mask is None else torch.cat([mask, mask.flip(1)])
        # Numbers must not decrease along the reversed row.
        seq_idx = None if seq_idx is None else torch.cat([seq_idx, seq_idx.amax() - seq_idx.flip(1)])
        x = self.embeddings(both)
        for block in self.stack.blocks:
            if self.swap_halves:
                x = x.flip(1, 2).roll(len(tokens), 0)
            x = block(x, mask=mask, seq_idx=seq_idx)
        first, second = self.stack.norm(x).chunk(2)
        return torch.cat([first, second.flip(1, 2)], dim=-1), []

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, (..., d_model) or (..., 2 d_model) to (..., vocab_size)."""
        weight = self.lm_head.weight
        if self.strands == "one":
            return self.lm_head(hidden.to(weight.dtype))
        first, second = hidden.to(weight.dtype).chunk(2, dim=-1)
        return self.lm_head(first) + self.lm_head(second.flip(-1))[..., self.complement]

    def layers(self) -> list[str]:
        """Names for `layer`: "embedding", "layer0", ..., "stack" (with the final norm, what the head reads)."""
        return ["embedding", *(f"layer{k}" for k in range(len(self.stack.blocks))), "stack"]

    def layer(self, tokens: Tensor, name: str, *, mask: Tensor | None = None) -> Layer:
        """What one layer makes of the sequences; only "stack" of an equivariant model holds both strands.

        Args:
            tokens: Ids, (b, l).
            name: One of `layers()`.
            mask: True at real positions, (b, l).

        Raises:
            ValueError: for an unknown name.
        """
        names = self.layers()
        if name not in names:
            raise ValueError(f"unknown layer {name!r}; this model has {', '.join(names)}.")
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        start = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if name == "stack":
            return Layer(self.hidden(tokens, mask=mask)[0], start, real)
        x = self.embeddings(tokens)
        depth = 0 if name == "embedding" else int(name.removeprefix("layer")) + 1
        for block in self.stack.blocks[:depth]:
            x = block(x, mask=mask)
        return Layer(x, start, real)

    def sides(self, hidden: Tensor) -> list[Tensor]:
        """The vectors (b, l, d_model) of each strand in its own direction: what a head is applied to and averaged."""
        if self.strands == "one":
            return [hidden]
        first, second = hidden.chunk(2, dim=-1)
        return [first, second.flip(1, 2)]


def reverse_complement(tokens: Tensor, complement: Tensor) -> Tensor:
    """Ids (b, l) of the other strand; padding on one side comes to the other.

    Args:
        tokens: Ids.
        complement: (V,) id of the complement of each id.
    """
    return complement[tokens.flip(1)]


def caduceus_ph_1k(**overrides: Any) -> MaskedDNA:
    """118 wide, 4 layers, for windows of 1,024 bases; average both strands when predicting."""
    return _preset(overrides, d_model=118, n_layer=4, mixer="mamba")


def caduceus_ps_1k(**overrides: Any) -> MaskedDNA:
    """118 wide, 4 layers, for windows of 1,024 bases, equivariant."""
    return _preset(overrides, d_model=118, n_layer=4, mixer="mamba", strands="equivariant")


def caduceus_ph_131k(**overrides: Any) -> MaskedDNA:
    """256 wide, 16 layers, for windows of 131,072 bases; average both strands when predicting."""
    return _preset(overrides, d_model=256, n_layer=16, mixer="mamba")


def caduceus_ps_131k(**overrides: Any) -> MaskedDNA:
    """256 wide, 16 layers, for windows of 131,072 bases, equivariant."""
    return _preset(overrides, d_model=256, n_layer=16, mixer="mamba", strands="equivariant")


def hydra_dna_tiny(**overrides: Any) -> MaskedDNA:
    """64 wide, 2 layers: for tests."""
    return _preset(overrides, d_model=64, n_layer=2, mixer_options={"d_state": 16})


def hydra_dna_small(**overrides: Any) -> MaskedDNA:
    """256 wide, 8 layers."""
    return _preset(overrides, d_model=256, n_layer=8)


def hydra_dna_ps_small(**overrides: Any) -> MaskedDNA:
    """256 wide, 8 layers, equivariant."""
    return _preset(overrides, d_model=256, n_layer=8, strands="equivariant")


def _preset(overrides: dict[str, Any], **defaults: Any) -> MaskedDNA:
    return MaskedDNA(**(defaults | overrides))
