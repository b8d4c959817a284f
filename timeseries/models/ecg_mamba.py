"""Classifier of 12-lead electrocardiograms: a convolutional stem, then a bidirectional Mamba, several labels a record.

Jiang et al. (2025), "One Dimensional CNN ECG Mamba for Multilabel Abnormality Classification in 12 Lead ECG". The
paper leaves details of the stem open; this one has widths 15, 9 and 5, each halving the rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ssmcore import Stack
from .classifiers import masked_mean

if TYPE_CHECKING:
    from ..labelled import SeriesBatch

__all__ = ["ECGMamba"]


class ECGMamba(nn.Module):
    """Convolutions along time, `Bidirectional` Mamba blocks, mean over the record, linear head.

    Records of other rates must be resampled before; 10 s at 500 Hz are 5,000 steps and 625 tokens.

    Args:
        n_variates: Leads.
        num_classes: Width of the logits.
        d_model: Width of a token.
        n_layer: Blocks.
        d_state: States of the Mambas.
        kernels: Widths of the convolutions, odd.
        strides: Their strides.
        dropout: Before the head.

    Raises:
        ValueError: if a width is even or the two lists differ in length.
    """

    def __init__(
        self,
        n_variates: int = 12,
        num_classes: int = 5,
        *,
        d_model: int = 64,
        n_layer: int = 2,
        d_state: int = 16,
        kernels: tuple[int, ...] = (15, 9, 5),
        strides: tuple[int, ...] = (2, 2, 2),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(kernels) != len(strides) or any(width % 2 == 0 for width in kernels):
            raise ValueError(f"expected odd widths and as many strides, got kernels {kernels} and strides {strides}")
        self.n_variates, self.strides = n_variates, tuple(strides)
        widths = [n_variates, *(max(8, d_model >> (len(kernels) - 1 - k)) for k in range(len(kernels)))]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, width, stride, width // 2, bias=False)
            for a, b, width, stride in zip(widths, widths[1:], kernels, strides)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths[1:])
        self.project = nn.Linear(widths[-1], d_model)
        options = {"mixer": "mamba", "mixer_options": {"d_state": d_state, "expand": 1}}
        self.stack = Stack(d_model, ["bidirectional"] * n_layer, mixer_options=options)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(d_model, num_classes)

    def forward(self, batch: SeriesBatch) -> Tensor:
        """Logits (b, num_classes)."""
        if batch.x.shape[1] != self.n_variates:
            raise ValueError(f"the model was built for {self.n_variates} variates, the data has {batch.x.shape[1]}")
        steps = batch.steps
        x = torch.where(batch.x_mask & steps[:, None], batch.x, 0.0)
        for convolution, norm, stride in zip(self.convolutions, self.norms, self.strides):
            x = convolution(x)
            steps = steps[:, ::stride]
            x = torch.where(steps[:, None], F.silu(norm(x)), 0.0)  # nothing flows in from behind the end
        hidden = self.stack(self.project(x.mT), mask=steps)
        return self.head(self.dropout(masked_mean(hidden, steps, dim=1)))
