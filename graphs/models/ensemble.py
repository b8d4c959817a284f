"""Several models in one: trained on the same batches, each for itself, and asked for their mean.

Source: Lakshminarayanan, Pritzel & Blundell (2017), section 2.4, without adversarial examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Graph, GraphBatch
from ..pyg import as_batch
from .graph_model import GraphModel


class GraphEnsemble(nn.Module):
    """The mean of models that differ in their first weights.

    Args:
        members: Models of the same outputs, at least one.

    Raises:
        ValueError: if there is none.
    """

    def __init__(self, members: Sequence[GraphModel]) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs at least one model, got none.")
        self.members = nn.ModuleList(members)

    @property
    def first(self) -> GraphModel:
        """The first member, whose layers pictures show."""
        member = self.members[0]
        assert isinstance(member, GraphModel)
        return member

    def each(self, batch: GraphBatch | Graph | Any) -> list[Tensor]:
        """What every member predicts, (graphs or nodes, outputs) each.

        Training is for the mean of their losses, which keeps them different.
        """
        batch = as_batch(batch)
        batch = batch.with_topology() if self.first.uses_topology else batch
        batch = batch.with_clusters() if self.first.uses_clusters else batch
        return [member(batch) for member in self.members]

    def forward(self, batch: GraphBatch | Graph | Any) -> Tensor:
        """Predict; see `GraphModel.forward`. Logits of classes are averaged as values are."""
        return torch.stack(self.each(batch)).mean(0)
