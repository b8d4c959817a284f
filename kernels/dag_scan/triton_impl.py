"""The scan over a DAG in Triton: rows of states are gathered from the parents, weighted, added up and stored once.

    forward    S_v = x_v B_v^T + sum_{u->v} a_uv S_u,    y_v = S_v C_v
    backward   G_v = dy_v C_v^T + sum_{v->w} a_vw G_w,   dx_v = G_v B_v,  dB_v = G_v^T x_v,  dC_v = S_v^T dy_v,
               da_uv = <S_u, G_v>

The backward recurrence is the forward one with other tensors and the edges turned round, so the same kernels do both.
They have three schedules. By nodes: one launch, whose programs all run at once and are dealt out nodes in topological
order; a program waits until the parents of its node are done, and fetches what the next nodes need beside them
meanwhile. By levels, where these have many bytes of states: a launch for each. By graphs, for narrow and deep ones: a
program per graph and column tile, which walks the nodes in order; a program reads only columns that it wrote. Sums have
a fixed order.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import apply, call, operator
from ..triton_utils import INTERPRETED, cdiv, multiprocessors, next_power_of_2, on_device
from .chunked import DagScan, DagScanGradient, fake_backward, fake_forward, state_block
from .order import DagOrder
from .triton_kernels import _dag_edges_kernel, _dag_level_kernel, _dag_maps_kernel, _dag_walk_kernel
from .triton_sweep import _dag_nodes_kernel

_BLOCK_R = 256  # columns of a tile of states at most
_AT_ONCE = 8  # edges of a node that are fetched together
_WAITING = 32  # parents that a node waits for at once
_LARGE = 2**23  # bytes of states in an average level from which on a launch for each level is faster
# A launch costs about as much as so many steps of a program that walks a graph.
_STEPS_OF_A_LAUNCH = 6


def dag_scan_triton(
    x: Tensor, weight: Tensor, B: Tensor, C: Tensor, order: DagOrder, reverse: bool, max_state_bytes: int
) -> Tensor:
    """See `dag_scan`; `weight` (e, h) in the dtype of the sums is what an edge multiplies a state with."""
    y, _ = apply(_DagScan, x, weight, B, C, order.tensors(), reverse, max_state_bytes)
    return y


def _propagate(
    x: Tensor,
    keys: Tensor,
    readers: Tensor,
    weight: Tensor,
    topology: list[Tensor],
    walk: bool,
    levels: list[int],
    part: slice,
    y: Tensor,
    backwards: bool,
) -> Tensor:
    """States (v, h p, n) of one block of n by position; adds what `readers` read of them to `y`."""
    perm, along, against, graph_ptr, places = topology[0], topology[1:4], topology[4:7], topology[7], topology[8]
    nodes, heads, headdim = x.shape
    groups, n = keys.shape[1:]
    size = min(part.stop, n) - part.start
    columns, padded = heads * headdim, next_power_of_2(size)
    largest_tile = max(padded, 1024 if INTERPRETED else _BLOCK_R)
    states = weight.new_empty(nodes, columns, size)
    given = x, keys, readers, weight, perm, *(against if backwards else along), states, y
    options: dict[str, Any] = {
        "HEADS": heads, "HEADDIM": headdim, "GROUPS": groups, "SIZE": size, "PADDED": padded, "ADD": part.start > 0,
        "ACC": _acc(weight),
    }  # fmt: skip
    if not walk and not levels:
        width = min(next_power_of_2(headdim) * padded, largest_tile)
        rows = min(next_power_of_2(heads), largest_tile // width)
        tiles = cdiv(headdim * padded, width) * cdiv(heads, rows)
        at_once, programs, launch = _one_launch(rows * width, padded, nodes * tiles, x.device)
        done = torch.zeros(nodes * tiles, dtype=torch.int32, device=x.device)
        _dag_nodes_kernel[(programs,)](
            *given, done, nodes, part.start, n,
            BACKWARDS=backwards, ROWS=rows, WIDTH=width, AT_ONCE=at_once, WAITING=_WAITING, **options, **launch,
        )  # fmt: skip
        return states
    block_r = min(next_power_of_2(columns * padded), largest_tile)
    tiles = cdiv(columns * padded, block_r)
    options |= {"COLUMNS": columns, "BLOCK_R": block_r}
    if walk:
        warps = {} if INTERPRETED else {"num_warps": max(1, min(4, block_r // 64))}
        _dag_walk_kernel[(len(graph_ptr) - 1, tiles)](
            *given, graph_ptr, places, part.start, n, BACKWARDS=backwards, **options, **warps
        )
        return states
    options["NODES"] = 1 if INTERPRETED else max(1, min(4, 128 // block_r))
    options["AT_ONCE"] = _AT_ONCE if options["NODES"] == 1 else _AT_ONCE // 2
    options |= {} if INTERPRETED else {"num_warps": max(1, min(4, block_r // 128))}
    bounds = list(itertools.pairwise(levels))
    for begin, end in reversed(bounds) if backwards else bounds:
        grid = cdiv(end - begin, options["NODES"]), tiles
        _dag_level_kernel[grid](*given, begin, end, part.start, n, **options)
    return states


def _one_launch(tile: int, padded: int, items: int, device: torch.device) -> tuple[int, int, dict[str, Any]]:
    """Edges fetched together, programs, and options of a launch by nodes.

    A program is one warp. The larger its tile, the more registers it needs, and the fewer programs run at once.
    """
    if INTERPRETED:
        return 4, 1, {}
    at_once = _AT_ONCE if tile > 128 else _AT_ONCE // 2
    each = 16 if padded > 1 else 24 if tile > 128 else 32  # programs on a multiprocessor
    if device.type == "cuda" and torch.cuda.get_device_properties(device).max_threads_per_multi_processor < 2048:
        each = min(each, 16)  # as many as such a device takes
    launch = {"num_warps": 1, "maxnreg": 65536 // (32 * each) // 8 * 8, "launch_cooperative_grid": True}
    return at_once, min(each * multiprocessors(device), items), launch


def _split(topology: list[Tensor], x: Tensor, weight: Tensor, block: int) -> tuple[list[Tensor], bool, list[int]]:
    """What kernels read of an order; whether to walk its graphs one by one; and its levels, if each gets a launch.

    Kernels and not the host read the order itself, so that calls with other graphs of the same size can be replayed.
    """
    (perm, _, level_ptr, edge_perm, src, dst, row_ptr, _, _, out_row_ptr, out_dst, out_edge, _, graph_ptr, places,
     _, largest) = topology  # fmt: skip
    count, state_bytes = len(level_ptr) - 1, x.numel() * block * weight.element_size()
    walk = int(largest) < _STEPS_OF_A_LAUNCH * count
    levels = [] if walk or state_bytes < _LARGE * count else level_ptr.tolist()
    return [perm, row_ptr, src, edge_perm, out_row_ptr, out_dst, out_edge, graph_ptr, places, dst], walk, levels


@operator("dag_scan_triton_fwd")
def _forward(
    x: Tensor, weight: Tensor, B: Tensor, C: Tensor, topology: list[Tensor], reverse: bool, max_state_bytes: int
) -> tuple[Tensor, Tensor]:
    """Outputs (v, h, p) in the order of the nodes, and the states by position if they fit, else nothing."""
    block = state_block(x, weight, B.shape[2], max_state_bytes)
    return _scan(x, weight, B, C, *_split(topology, x, weight, block), reverse, block)


@replayed
def _scan(
    x: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    topology: list[Tensor],
    walk: bool,
    levels: list[int],
    reverse: bool,
    block: int,
) -> tuple[Tensor, Tensor]:
    x, weight, B, C = (tensor.contiguous() for tensor in (x, weight, B, C))
    size = B.shape[2]
    y = torch.empty_like(x, dtype=x.dtype if block == size else weight.dtype)
    states = weight.new_empty(0)
    with on_device(x):
        for n in range(0, size, block):
            states = _propagate(x, B, C, weight, topology, walk, levels, slice(n, n + block), y, reverse)
    return y.to(x.dtype), states.view(*x.shape, size) if block == size else weight.new_empty(0)


torch.library.register_fake("ssm::dag_scan_triton_fwd", fake_forward)


@operator("dag_scan_triton_bwd")
def _backward(
    x: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    dy: Tensor,
    topology: list[Tensor],
    reverse: bool,
    max_state_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    block = B.shape[2] if kept.numel() else state_block(x, weight, B.shape[2], max_state_bytes)
    return _gradients(x, weight, B, C, kept, dy, *_split(topology, x, weight, block), reverse, block)


@replayed
def _gradients(
    x: Tensor,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    dy: Tensor,
    topology: list[Tensor],
    walk: bool,
    levels: list[int],
    reverse: bool,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, B, C, dy = (tensor.contiguous() for tensor in (x, weight, B, C, dy))
    nodes, heads, headdim = x.shape
    groups, n = B.shape[1:]
    dx = torch.empty_like(x, dtype=x.dtype if block == n else weight.dtype)
    unread = torch.empty_like(dx) if block < n else dx  # outputs of the recomputed states
    dweight, dB, dC = torch.empty_like(weight), torch.empty_like(B), torch.empty_like(C)
    perm, (source, edge), target = topology[0], topology[2:4], topology[9]
    edges = len(edge)
    if reverse:
        source, target = target, source
    with on_device(x):
        for start in range(0, n, block):
            part = slice(start, start + block)
            if kept.numel():
                states = kept
            else:
                states = _propagate(x, B, C, weight, topology, walk, levels, part, unread, reverse)
            gradients = _propagate(dy, C, B, weight, topology, walk, levels, part, dx, not reverse)
            size = gradients.shape[2]
            options: dict[str, Any] = {"ACC": _acc(weight)}
            padded, width = next_power_of_2(size), heads // groups * headdim
            block_p = max(1, min(next_power_of_2(width), 256 // padded))
            block_v = max(1, (16384 if INTERPRETED else 1024) // (padded * block_p))
            block_v = min(block_v, next_power_of_2(nodes))
            _dag_maps_kernel[(cdiv(nodes, block_v), groups)](
                x, dy, perm, states, gradients, dB, dC, nodes, start, n,
                WIDTH=width, COLUMNS=heads * headdim, GROUPS=groups, SIZE=size, PADDED=padded,
                BLOCK_V=block_v, BLOCK_P=block_p, **options,
            )  # fmt: skip
            if edges:
                block_r = min(next_power_of_2(headdim * size), 128)
                block_e = min(next_power_of_2(edges), max(1, (16384 if INTERPRETED else 1024) // block_r))
                _dag_edges_kernel[(cdiv(edges, block_e), heads)](
                    source, target, edge, states, gradients, dweight, edges,
                    HEADS=heads, ROW=headdim * size, ADD=start > 0, BLOCK_E=block_e, BLOCK_R=block_r, **options,
                )  # fmt: skip
    return dx.to(x.dtype), dweight, dB, dC


torch.library.register_fake("ssm::dag_scan_triton_bwd", fake_backward)


def _acc(weight: Tensor) -> Any:
    return tl.float64 if weight.dtype == torch.float64 else tl.float32


class _DagScan(DagScan):
    """The forward op with its gradient."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return call(_forward, *arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstates: Tensor | None) -> tuple[Any, ...]:
        return DagScan.gradients(_DagScanGradient, ctx, dy)


class _DagScanGradient(DagScanGradient):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return call(_backward, *arguments)
