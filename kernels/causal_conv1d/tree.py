"""`causal_conv1d` over a tree of positions: the window of each node lies along its path."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_devices, check_floating, check_shapes
from ..dispatch import cast_for_autocast
from ..token_tree import TokenTree


def conv_tree(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tree: TokenTree,
    state: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
) -> Tensor:
    """Short depthwise convolution along every path of a tree.

        y_t = act(bias + sum_i weight_i x_{a(t, k-1-i)}),      a(t, j) the j-th node above t

    Args:
        x: Input of each node, (b, l, c).
        weight: (c, k).
        bias: (c,).
        tree: Of l nodes, for each row or for all.
        state: The k - 1 inputs before the tree, oldest first, (b, c, k - 1); zeros if None.
        activation: "silu" or None.

    Returns:
        (b, l, c) in the dtype of `x`.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, or the activation is unknown.

    Products and sums are float32 at least.
    """
    _check(x, tree, state, weight=weight, bias=bias)
    if activation not in ("silu", None):
        raise ValueError(f"`activation` must be 'silu' or None, got {activation!r}.")
    (x,) = cast_for_autocast(x)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    nodes = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    window = _gather(x, tree, nodes, weight.shape[1], state)  # (b, l, k, c)
    y = (window.to(dtype) * weight.to(dtype).mT).sum(2)
    y = y if bias is None else y + bias.to(dtype)
    return (F.silu(y) if activation else y).to(x.dtype)


def conv_tree_state(x: Tensor, tree: TokenTree, node: Tensor, state: Tensor) -> Tensor:
    """The last inputs of the path that ends in one node of each row.

    Args:
        x: Input of each node, (b, l, c).
        tree: Of l nodes.
        node: Which node, (b,) integers; -1: none, which gives `state` back.
        state: The k - 1 inputs before the tree, oldest first, (b, c, k - 1).

    Returns:
        (b, c, k - 1) in the dtype of `x`.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree.
    """
    _check(x, tree, state, node=node)
    return _gather(x, tree, node[:, None], state.shape[2] + 1, state)[:, 0, 1:].mT


def _gather(x: Tensor, tree: TokenTree, nodes: Tensor, size: int, state: Tensor | None) -> Tensor:
    """The last `size` inputs of the paths that end in nodes (b, m), oldest first: (b, m, size, c)."""
    batch, _, channels = x.shape
    # One column more than the state has, for the oldest of `size` places before the tree; only dropped ones lie there.
    before = x.new_zeros(batch, size, channels)
    if state is not None and size > 1:
        before = torch.cat([before[:, :1], state.to(x.dtype).mT], dim=1)
    place = tree.lineage(nodes, size) + size
    picked = torch.cat([before, x], dim=1).gather(1, place.flatten(1)[..., None].expand(-1, -1, channels))
    return picked.unflatten(1, (nodes.shape[1], size))


def _check(
    x: Tensor,
    tree: TokenTree,
    state: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    node: Tensor | None = None,
) -> None:
    check_floating(x=x, weight=weight, bias=bias, state=state)
    if not isinstance(tree, TokenTree):
        raise TypeError(f"`tree` must be a TokenTree from token_tree(parent), got {type(tree).__name__}.")
    ends = {"node": (node, "b"), "tree.parent": (tree.parent, "b? l")}
    sizes = check_shapes(x=(x, "b l c"), weight=(weight, "c k"), bias=(bias, "c"), **ends)
    kept = "k" if weight is None else str(sizes["k"] - 1)
    check_shapes(x=(x, "b l c"), state=(state, f"b c {kept}"))
    check_devices(x=x, weight=weight, bias=bias, state=state, node=node, **{"tree.parent": tree.parent})
