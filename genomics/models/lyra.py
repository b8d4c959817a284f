"""Lyra: a small supervised model of projected gated convolutions and S4D.

    PGC:  [v, g] = rms(W_in x),   y = rms(W_out (g * dwconv3(v))),   x + dropout(y)
    S4D:  x + dropout(s4d(rms(x)))

Ramesh et al. (2025), "Lyra: An Efficient and Expressive Subquadratic Architecture for Modeling Biological Sequences".
`lyra` is 64 wide with 2 convolutions and 4 S4D layers, 109,761 parameters with one output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import causal_conv1d
from ...ssmcore import RMSNorm
from ...ssmcore.mixers import create_mixer
from ..sequence import vocabulary as read_vocabulary


class Lyra(nn.Module):
    """One-hot bases, gated convolutions, S4D, mean over the sequence, linear head.

    Args:
        n_outputs: Values or classes predicted.
        d_model: Width.
        n_conv: Gated convolutions.
        n_layer: S4D layers.
        d_state: States per channel.
        expand: Inner width of the convolutions over the outer one.
        dropout: After each block and before the head.
        bidirectional: Let S4D see both directions.
        vocabulary: Name of the vocabulary.
        device: Where to create the parameters.
        dtype: Their dtype.

    Attributes:
        supervised, is_causal, strands, max_length: What tasks and verbs need to know about a model.
    """

    supervised = True
    is_causal = False
    strands = "one"
    max_length: int | None = None
    family = "lyra"

    def __init__(
        self,
        n_outputs: int = 1,
        *,
        d_model: int = 64,
        n_conv: int = 2,
        n_layer: int = 4,
        d_state: int = 64,
        expand: int = 1,
        dropout: float = 0.2,
        bidirectional: bool = False,
        vocabulary: str = "acgt",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n_outputs < 1:
            raise ValueError(f"expected n_outputs of at least 1, got {n_outputs}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config: dict[str, Any] = {
            "n_outputs": n_outputs,
            "d_model": d_model,
            "n_conv": n_conv,
            "n_layer": n_layer,
            "d_state": d_state,
            "expand": expand,
            "dropout": dropout,
            "bidirectional": bidirectional,
            "vocabulary": vocabulary,
        }
        self.vocabulary, self.d_model = vocabulary, d_model
        self.vocab_size = read_vocabulary(vocabulary).size
        self.embed = nn.Linear(self.vocab_size, d_model, **factory)
        self.convs = nn.ModuleList(GatedConv(d_model, expand * d_model, **factory) for _ in range(n_conv))
        self.norms = nn.ModuleList(RMSNorm(d_model, **factory) for _ in range(n_layer))
        self.mixers = nn.ModuleList(
            create_mixer("s4d", d_model, d_state=d_state, bidirectional=bidirectional, dropout=dropout, **factory)
            for _ in range(n_layer)
        )
        self.norm = RMSNorm(d_model, **factory)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, n_outputs, **factory)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Predictions (b, n_outputs) for ids (b, l).

        Args:
            tokens: Ids.
            mask: True at real positions, (b, l).
            seq_idx: None; rows are single sequences.

        Raises:
            ValueError: for packed rows.
        """
        return self.predict(self.hidden(tokens, mask=mask, seq_idx=seq_idx)[0], mask)

    def hidden(
        self, tokens: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, list[Any]]:
        """The vectors (b, l, d_model) before pooling."""
        if seq_idx is not None:
            raise ValueError("a supervised model takes one sequence per row; set pack: false in the data module.")
        x = self.embed(F.one_hot(tokens, self.vocab_size).to(self.embed.weight.dtype))
        for conv in self.convs:
            x = x + self.dropout(conv(x, mask))
        for norm, mixer in zip(self.norms, self.mixers):
            x = x + self.dropout(mixer(norm(x), mask=mask))
        return x, []

    def predict(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Mean of (b, l, d) over the positions where `mask` (b, l) is True, norm, head: (b, n_outputs)."""
        pooled = hidden.mean(1) if mask is None else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(self.dropout(self.norm(pooled)))


class GatedConv(nn.Module):
    """Projected gated convolution: rms(W_out (g * conv(v))) with [v, g] = rms(W_in x).

    Args:
        d_model: Width.
        hidden: Inner width.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * hidden, **factory)
        self.in_norm = RMSNorm(2 * hidden, **factory)
        self.conv1d = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden, **factory)
        self.out_proj = nn.Linear(hidden, d_model, **factory)
        self.out_norm = RMSNorm(d_model, **factory)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (b, l, d_model) to itself; padding is not seen."""
        value, gate = self.in_norm(self.in_proj(x)).chunk(2, dim=-1)
        if mask is not None:
            value = value * mask[..., None]
        weight = self.conv1d.weight[:, 0]
        value, _ = causal_conv1d(value, weight, self.conv1d.bias, activation=None, symmetric=True)
        return self.out_norm(self.out_proj(gate * value))


def lyra(**overrides: Any) -> Lyra:
    """64 wide, 2 gated convolutions, 4 S4D layers."""
    return Lyra(**overrides)
