"""What a layer keeps of a drafted tree of positions, so that the state can move to any node without running again.

y, draft = mixer.verify(x, state, tree);    state = draft.accept(node)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ...kernels import TokenTree, conv_tree_state, ssd_tree_state
from .common import ConvSSMState, Layout


class Draft(Protocol):
    """A tree that a layer or model has seen, and the state before it."""

    @property
    def tree(self) -> TokenTree:
        """The tree."""

    def accept(self, node: Tensor) -> Any:
        """The state after each row's path to `node`, (b,) integers; -1 takes none of the tree."""


@dataclass(frozen=True, eq=False)
class SSDDraft:
    """Of a mixer with a short convolution and `ssd`.

    Attributes:
        tree: The tree.
        state: Before it.
        conv_in: Inputs of the convolution, (b, l, c).
        x: Inputs of the recurrence, (b, l, h, p).
        log_decay: (b, l, h).
        B: (b, l, g, n).
        weight: (b, l, h) or None.
    """

    tree: TokenTree
    state: ConvSSMState
    conv_in: Tensor
    x: Tensor
    log_decay: Tensor
    B: Tensor
    weight: Tensor | None

    def accept(self, node: Tensor) -> ConvSSMState:
        """The state after each row's path."""
        conv = conv_tree_state(self.conv_in, self.tree, node, self.state.conv)
        ssm = ssd_tree_state(self.x, self.log_decay, self.B, self.tree, node, self.state.ssm, weight=self.weight)
        return ConvSSMState(conv, ssm)


@dataclass(frozen=True, eq=False)
class AttentionDraft:
    """Of softmax attention.

    Attributes:
        mixer: The attention, whose window says where keys are kept.
        tree: The tree.
        state: Before it.
        conv_in: Inputs of the convolution, (b, l, c), or None.
        k: Rotated keys, (b, g, l, headdim).
        v: Values, (b, g, l, headdim).
    """

    mixer: Any
    tree: TokenTree
    state: Any
    conv_in: Tensor | None
    k: Tensor
    v: Tensor

    def accept(self, node: Tensor) -> Any:
        """The state after each row's path."""
        path, count = self.tree.path(node)
        index = path[:, None, :, None].expand(-1, self.k.shape[1], -1, self.k.shape[3])
        conv = None
        if self.conv_in is not None:
            conv = conv_tree_state(self.conv_in, self.tree, node, self.state.conv)
        return self.mixer.extended(
            self.state, self.k.gather(2, index), self.v.gather(2, index), conv, Layout(count=count)
        )
