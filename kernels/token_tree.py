"""Trees of positions: several continuations of one sequence that share their beginnings, such as drafts of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import readable


@dataclass(frozen=True)
class TokenTree:
    """A tree of l nodes per row, made by `token_tree`; b is 1 where all rows have the same tree.

    Attributes:
        parent: Node before each node, (b, l) int64; -1 where a node follows on what was before the tree.
        ancestors: Whether node s is node t or stands above it, (b, l, l) bool with t first.
        depth: Nodes above each node, (b, l) int64.
        height: Nodes of the longest path.
    """

    parent: Tensor
    ancestors: Tensor
    depth: Tensor
    height: int

    @property
    def size(self) -> int:
        """Nodes l."""
        return self.parent.shape[1]

    def to(self, device: torch.device | str) -> TokenTree:
        """The same tree on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("parent", "ancestors", "depth")}
        return replace(self, **moved)

    def lineage(self, node: Tensor, size: int) -> Tensor:
        """The last `size` places of the paths that end in nodes, oldest first.

        Args:
            node: (b, m) integers; -1 is the place before the tree, -2 the one before that.
            size: Places of each path.

        Returns:
            (b, m, size) int64; negative where a path reaches back before the tree.
        """
        parent = self.parent.expand(node.shape[0], -1)
        found = [node.to(torch.int64)]
        for _ in range(size - 1):
            last = found[-1]
            found.append(torch.where(last >= 0, parent.gather(1, last.clamp(min=0)), last - 1))
        return torch.stack(found[::-1], dim=-1)[..., :size]

    def path(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes from the first one down to `node` (b,), left-aligned in (b, height), and how many there are, (b,).

        Places behind the path hold some node; a node of -1 has no path.
        """
        depth = self.depth.expand(node.shape[0], -1).gather(1, node[:, None].clamp(min=0))[:, 0]
        count = torch.where(node >= 0, depth + 1, 0)
        places = torch.arange(self.height, device=node.device) + (self.height - count)[:, None]
        lineage = self.lineage(node[:, None], self.height)[:, 0]
        return lineage.gather(1, places.clamp(max=self.height - 1)).clamp(min=0), count


def token_tree(parent: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> TokenTree:
    """Read a tree from the parent of each node.

        token_tree([-1, 0, 0, 1])          0 - 1 - 3,  0 - 2

    Args:
        parent: (l,) or (b, l) integers, -1 where a node follows on the state; parents stand before their children.

    Raises:
        TypeError: if it is not of integers.
        ValueError: if there is no node, or, as far as a CPU sees it, a parent stands behind its child.
    """
    nodes = torch.as_tensor(parent)
    nodes = nodes if nodes.numel() else nodes.to(torch.int64)  # an empty list has no integers
    if nodes.is_floating_point() or nodes.dtype == torch.bool:
        raise TypeError(f"`parent` must be of integers, got {nodes.dtype}.")
    if nodes.dim() not in (1, 2) or not nodes.shape[-1]:
        raise ValueError(f"`parent` must be (l,) or (b, l) with l >= 1, got shape {tuple(nodes.shape)}.")
    nodes = nodes.to(torch.int64).reshape(-1, nodes.shape[-1])
    place = torch.arange(nodes.shape[1], device=nodes.device)
    if readable(nodes) and bool(((nodes >= place) | (nodes < -1)).any()):
        row, node = (((nodes >= place) | (nodes < -1)).nonzero()[0]).tolist()
        raise ValueError(f"node {node} has parent {int(nodes[row, node])}, expected -1 to {node - 1}; parents first.")
    reach = (nodes[..., None] == place).float() + torch.eye(len(place), device=nodes.device)
    for _ in range((len(place) - 1).bit_length()):  # paths of twice the length with each product
        reach = (reach @ reach).clamp(max=1)
    ancestors = reach > 0
    depth = ancestors.sum(-1) - 1
    return TokenTree(nodes, ancestors, depth, int(depth.max()) + 1)
