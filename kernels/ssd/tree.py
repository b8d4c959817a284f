"""`ssd` over a tree of positions, in which every node goes on from the state of its parent.

Checks many drafted continuations at once: Wu et al. (2025), "STree: Speculative Tree Decoding for Hybrid State-Space
Models".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_devices, check_floating, check_log_decays, check_shapes
from ..dispatch import Backend, cast_for_autocast, choose
from ..token_tree import TokenTree
from .op import check_groups, state_dtype


def ssd_tree(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    tree: TokenTree,
    initial_state: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    D: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """State-space duality along every path of a tree.

        H_t = exp(log_decay_t) H_parent(t) + weight_t x_t B_t^T,      y_t = H_t C_t + D x_t,      H_{-1} = initial_state

    Args:
        x: Input of each node, (b, l, h, p).
        log_decay: Logarithm of the decay, <= 0, (b, l, h).
        B: What enters the state, (b, l, g, n).
        C: What is read from the state, (b, l, g, n).
        tree: Of l nodes, for each row or for all.
        initial_state: State before the tree, (b, h, p, n).
        weight: Weight of each input, (b, l, h); None: ones.
        D: Skip from `x` to the output, (h,).
        backend: "auto", "reference" or "chunked" (products of matrices); see `omnissm.kernels.use_backend`.

    Returns:
        y, (b, l, h, p) in the dtype of `x`. `ssd_tree_state` gives the state of a node.

    Raises:
        TypeError: if an argument is no floating tensor, or the tree none of `token_tree`.
        ValueError: if shapes or devices disagree, or, as far as a CPU sees it, a log-decay is positive.
        BackendError: if `backend` is named explicitly and cannot run here.

    The fast path makes no state per node: with E_ts = exp(sum of log-decays from below s down to t) where s is t or
    above it, else 0, y = (C B^T * E) (weight x) + exp(sum down to t) H_{-1} C_t + D x. The sums cost l^3 h operations,
    little for trees of up to some hundred nodes, and are no differences. Differentiable in all floating tensors.
    """
    dtype = _check(x, log_decay, B, tree, initial_state, weight, C=C, D=D)
    chosen = choose(backend, x, op="ssd_tree", implementations=("reference", "chunked"))
    x, B, C = cast_for_autocast(x, B, C)
    if x.numel() == 0 or B.shape[-1] == 0:
        return torch.zeros_like(x)
    own = (x.to(dtype), _finite(log_decay.to(dtype)), _heads(B, x).to(dtype), _heads(C, x).to(dtype))
    state = None if initial_state is None else initial_state.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = (_reference if chosen == "reference" else _products)(*own, tree, state, weight)
    return (y if D is None else y + D.to(dtype)[:, None] * x.to(dtype)).to(x.dtype)


def ssd_tree_state(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    tree: TokenTree,
    node: Tensor,
    initial_state: Tensor | None = None,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """The state of `ssd_tree` at one node of each row: that of its path taken alone.

    Args:
        x: Input of each node, (b, l, h, p).
        log_decay: (b, l, h).
        B: (b, l, g, n).
        tree: Of l nodes.
        node: Which node, (b,) integers; -1: none, which gives the initial state.
        initial_state: State before the tree, (b, h, p, n).
        weight: Weight of each input, (b, l, h).

    Returns:
        (b, h, p, n), in float32 (float64 for float64 inputs).

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes or devices disagree.
    """
    dtype = _check(x, log_decay, B, tree, initial_state, weight, node=node)
    above = tree.ancestors.expand(x.shape[0], -1, -1)
    above = above.gather(1, node.clamp(min=0)[:, None, None].expand(-1, 1, x.shape[1]))[:, 0]
    above = (above & (node >= 0)[:, None]).to(dtype)  # (b, l): on the path
    with torch.autocast(x.device.type, enabled=False):
        steps = above[:, None] * _finite(log_decay.to(dtype)).mT  # (b, h, l)
        share = (steps @ _strictly(tree, dtype)).exp() * above[:, None]
        if weight is not None:
            share = share * weight.to(dtype).mT
        state = torch.einsum("bhl,blhp,blhn->bhpn", share, x.to(dtype), _heads(B, x).to(dtype))
        if initial_state is not None:
            state = state + steps.sum(-1).exp()[..., None, None] * initial_state.to(dtype)
    return state


def _products(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, tree: TokenTree, state: Tensor | None, weight: Tensor | None
) -> Tensor:
    """One masked product for all nodes; B and C are (b, l, h, n)."""
    above = tree.ancestors[:, None]  # (b, 1, t, s)
    steps = above * log_decay.mT[:, :, None, :]  # log-decays on the path to t, (b, h, t, j)
    sums = steps @ _strictly(tree, x.dtype)[:, None]  # of those below s
    matrix = (C.transpose(1, 2) @ B.permute(0, 2, 3, 1)) * torch.where(above, sums.exp(), 0)
    if weight is not None:
        matrix = matrix * weight.mT[:, :, None]
    y = (matrix @ x.transpose(1, 2)).transpose(1, 2)
    if state is not None:
        y = y + torch.einsum("blhn,bhpn->blhp", C, state) * steps.sum(-1).exp().mT[..., None]
    return y


def _reference(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, tree: TokenTree, state: Tensor | None, weight: Tensor | None
) -> Tensor:
    """A loop over nodes that keeps the state of each."""
    batch, length, heads, headdim = x.shape
    before = x.new_zeros(batch, heads, headdim, B.shape[-1]) if state is None else state
    states, outputs = [before], []
    parent, rows = tree.parent.expand(batch, -1), torch.arange(batch, device=x.device)
    for t in range(length):
        previous = torch.stack(states, dim=1)[rows, parent[:, t] + 1]
        entering = x[:, t] if weight is None else weight[:, t, :, None] * x[:, t]
        now = log_decay[:, t, :, None, None].exp() * previous + entering[..., None] * B[:, t, :, None]
        states.append(now)
        outputs.append((now * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def _finite(log_decay: Tensor) -> Tensor:
    """Decays of exactly 0 as such that round to it, since sums are products with zeros and ones."""
    return log_decay.clamp(min=-1e4)


def _strictly(tree: TokenTree, dtype: torch.dtype) -> Tensor:
    """1 where node s stands above node j, (b, j, s)."""
    return tree.ancestors.tril(-1).to(dtype)


def _heads(t: Tensor, x: Tensor) -> Tensor:
    """B or C for every head, (b, l, h, n)."""
    return t.repeat_interleave(x.shape[2] // t.shape[2], dim=2)


def _check(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    tree: TokenTree,
    initial_state: Tensor | None,
    weight: Tensor | None,
    *,
    C: Tensor | None = None,
    D: Tensor | None = None,
    node: Tensor | None = None,
) -> torch.dtype:
    """The dtype to compute in."""
    check_floating(x=x, log_decay=log_decay, B=B, C=C, initial_state=initial_state, weight=weight, D=D)
    if not isinstance(tree, TokenTree):
        raise TypeError(f"`tree` must be a TokenTree from token_tree(parent), got {type(tree).__name__}.")
    sizes = check_shapes(
        x=(x, "b l h p"),
        log_decay=(log_decay, "b l h"),
        B=(B, "b l g n"),
        C=(C, "b l g n"),
        initial_state=(initial_state, "b h p n"),
        weight=(weight, "b l h"),
        D=(D, "h"),
        node=(node, "b"),
        **{"tree.parent": (tree.parent, "b? l")},
    )
    tensors = {"x": x, "log_decay": log_decay, "B": B, "C": C, "initial_state": initial_state, "weight": weight, "D": D}
    check_devices(**tensors, node=node, **{"tree.parent": tree.parent})
    check_groups(sizes["h"], sizes["g"])
    check_log_decays(log_decay=log_decay)
    return state_dtype(*tensors.values())
