"""Drafts of several layers: what `verify` of stacks and mixers side by side returns beside the outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import TokenTree
from .mixers.drafts import Draft
from .states import PairState, StackState


@dataclass(frozen=True, eq=False)
class StackDraft:
    """A tree that a `Stack` has seen.

    Attributes:
        tree: The tree.
        layers: What each layer keeps of it.
        position: Tokens before the tree, (b,) int64.
    """

    tree: TokenTree
    layers: tuple[Draft, ...]
    position: Tensor

    def accept(self, node: Tensor) -> StackState:
        """The state after each row's path to `node`, (b,) integers; -1 takes none of the tree.

        Raises:
            TypeError: if `node` is not of integers.
            ValueError: if its shape is wrong or, as far as a CPU sees it, there is no such node.
        """
        if node.is_floating_point() or node.dtype == torch.bool:
            raise TypeError(f"`node` must be of integers, got {node.dtype}.")
        if node.shape != self.position.shape:
            raise ValueError(f"`node` must be {tuple(self.position.shape)}, one per row, got {tuple(node.shape)}.")
        if node.device.type == "cpu" and bool(((node < -1) | (node >= self.tree.size)).any()):
            raise ValueError(f"`node` must lie in -1 to {self.tree.size - 1}, got {node.tolist()}.")
        _, count = self.tree.path(node)
        return StackState(tuple(layer.accept(node) for layer in self.layers), self.position + count)


@dataclass(frozen=True, eq=False)
class PairDraft:
    """A tree that two mixers side by side have seen.

    Attributes:
        first: What the first keeps.
        second: What the second keeps.
    """

    first: Draft
    second: Draft

    @property
    def tree(self) -> TokenTree:
        """The tree, which both have seen."""
        return self.first.tree

    def accept(self, node: Tensor) -> PairState:
        """The states after each row's path."""
        return PairState(self.first.accept(node), self.second.accept(node))
