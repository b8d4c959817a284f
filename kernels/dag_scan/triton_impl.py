"""The scan over a DAG in Triton: rows of states are gathered from the parents, weighted, added up and stored once.

    forward    S_v = x_v B_v^T + sum_{u->v} a_uv S_u,    y_v = S_v C_v
    backward   G_v = dy_v C_v^T + sum_{v->w} a_vw G_w,   dx_v = G_v B_v,  dB_v = G_v^T x_v,  dC_v = S_v^T dy_v,
               da_uv = <S_u, G_v>

The backward recurrence is the forward one with other tensors and the edges turned round, so one kernel does both. It
has two schedules. By levels: a launch for each wide one, and one for a run of narrow ones, whose programs run at once
and wait for each other behind each level; where a CUDA graph is recorded, a launch for each level. By graphs, for
narrow and deep ones: a program per graph and column tile, which walks the nodes in order; a program reads only columns
that it wrote. Sums have a fixed order.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transforms import apply, operator
from ..triton_utils import INTERPRETED, multiprocessors, on_device
from .chunked import DagScan, DagScanGradient, fake_backward, fake_forward, state_block
from .order import DagOrder
from .triton_kernels import (
    _dag_edges_kernel,
    _dag_level_kernel,
    _dag_maps_kernel,
    _dag_sweep_kernel,
    _dag_walk_kernel,
)

_BLOCK_R = 256  # columns of a tile of states at most
_AT_ONCE = 8  # edges of a node that are fetched together
_PROGRAMS = 4  # that wait for each other, on each multiprocessor: it has the registers for as many
_NARROW = 4  # tiles of nodes and columns for each multiprocessor up to which a level is narrow
# A launch costs about as much as so many steps of a program that walks a graph.
_STEPS_OF_A_LAUNCH = 6


def dag_scan_triton(
    x: Tensor, weight: Tensor, B: Tensor, C: Tensor, order: DagOrder, reverse: bool, max_state_bytes: int
) -> Tensor:
    """See `dag_scan`; `weight` (e, h) in the dtype of the sums is what an edge multiplies a state with."""
    y, _ = apply(_DagScan, x, weight, B, C, order.tensors(), reverse, max_state_bytes)
    return y


class _Topology:
    """What the kernels read of an order, in the direction in which states flow and against it."""

    def __init__(self, tensors: list[Tensor], reverse: bool) -> None:
        (self.perm, _, level_ptr, edge_perm, src, dst, row_ptr, _, out_perm, out_row_ptr, _, self.graph_ptr,
         self.places, self.level_starts, largest) = tensors  # fmt: skip
        self.level_ptr: list[int] = level_ptr.tolist()
        # (first edge of each node, node at the other end, edge): along the edges, and against them
        along, against = (row_ptr, src, edge_perm), (out_row_ptr, dst[out_perm], edge_perm[out_perm])
        self.sides = (against, along) if reverse else (along, against)
        self.reverse = reverse
        # Edges from where the states come from to where they go
        self.source, self.target, self.edge = (dst, src, edge_perm) if reverse else (src, dst, edge_perm)
        self.walk = int(largest) < _STEPS_OF_A_LAUNCH * (len(self.level_ptr) - 1)

    def propagate(
        self, x: Tensor, keys: Tensor, readers: Tensor, weight: Tensor, part: slice, y: Tensor, adjoint: bool
    ) -> Tensor:
        """States (v, h p, n) of one block of n by position; adds what `readers` read of them to `y`."""
        nodes, heads, headdim = x.shape
        groups, n = keys.shape[1:]
        size = min(part.stop, n) - part.start
        columns, padded = heads * headdim, triton.next_power_of_2(size)
        block_r = max(padded, min(triton.next_power_of_2(columns * padded), 1024 if INTERPRETED else _BLOCK_R))
        states = weight.new_empty(nodes, columns, size)
        row_ptr, nbr, edge = self.sides[adjoint]
        given = x, keys, readers, weight, self.perm, row_ptr, nbr, edge, states, y
        options: dict[str, Any] = {
            "HEADS": heads, "HEADDIM": headdim, "COLUMNS": columns, "GROUPS": groups, "SIZE": size, "PADDED": padded,
            "ADD": part.start > 0, "ACC": _acc(weight), "BLOCK_R": block_r,
        }  # fmt: skip
        tiles = triton.cdiv(columns * padded, block_r)
        backwards = self.reverse != adjoint
        if self.walk:
            warps = {} if INTERPRETED else {"num_warps": max(1, min(4, block_r // 64))}
            _dag_walk_kernel[(len(self.graph_ptr) - 1, tiles)](
                *given, self.graph_ptr, self.places, part.start, n, BACKWARDS=backwards, **options, **warps
            )
            return states
        options["NODES"] = 1 if INTERPRETED else max(1, min(4, 128 // block_r))
        options["AT_ONCE"] = _AT_ONCE if options["NODES"] == 1 else _AT_ONCE // 2
        options |= {} if INTERPRETED else {"num_warps": max(1, min(4, block_r // 128))}
        for first, last in self._runs(tiles, options["NODES"], x.device, backwards):
            if last - first == 1:
                begin, end = self.level_ptr[first : last + 1]
                grid = triton.cdiv(end - begin, options["NODES"]), tiles
                _dag_level_kernel[grid](*given, begin, end, part.start, n, **options)
                continue
            arrived = torch.zeros(last - first, dtype=torch.int32, device=x.device)
            together = {} if INTERPRETED else {"launch_cooperative_grid": True}
            programs = 1 if INTERPRETED else _PROGRAMS * multiprocessors(x.device)
            _dag_sweep_kernel[(programs,)](
                *given, self.level_starts, arrived, first, last, tiles, part.start, n, BACKWARDS=backwards, **options,
                **together,
            )  # fmt: skip
        return states

    def _runs(self, tiles: int, nodes: int, device: torch.device, backwards: bool) -> list[tuple[int, int]]:
        """Levels [first, last) of each launch, in the order of the launches.

        A launch costs the host more than a narrow level takes, and a recorded one less than programs that wait.
        """
        recorded = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        most = 0 if recorded else _NARROW * multiprocessors(device)
        runs: list[tuple[int, int]] = []
        narrow_before = False
        for level, (begin, end) in enumerate(itertools.pairwise(self.level_ptr)):
            narrow = triton.cdiv(end - begin, nodes) * tiles <= most
            if narrow and narrow_before:
                runs[-1] = runs[-1][0], level + 1
            else:
                runs.append((level, level + 1))
            narrow_before = narrow
        return runs[::-1] if backwards else runs


@operator("dag_scan_triton_fwd")
def _forward(
    x: Tensor, weight: Tensor, B: Tensor, C: Tensor, topology: list[Tensor], reverse: bool, max_state_bytes: int
) -> tuple[Tensor, Tensor]:
    """Outputs (v, h, p) in the order of the nodes, and the states by position if they fit, else nothing."""
    x, weight, B, C = (tensor.contiguous() for tensor in (x, weight, B, C))
    size = B.shape[2]
    block = state_block(x, weight, size, max_state_bytes)
    y = torch.empty_like(x, dtype=x.dtype if block == size else weight.dtype)
    states = weight.new_empty(0)
    with on_device(x):
        order = _Topology(topology, reverse)
        for n in range(0, size, block):
            states = order.propagate(x, B, C, weight, slice(n, n + block), y, False)
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
    x, weight, B, C, dy = (tensor.contiguous() for tensor in (x, weight, B, C, dy))
    nodes, heads, headdim = x.shape
    groups, n = B.shape[1:]
    block = n if kept.numel() else state_block(x, weight, n, max_state_bytes)
    dx = torch.empty_like(x, dtype=x.dtype if block == n else weight.dtype)
    unread = torch.empty_like(dx) if block < n else dx  # outputs of the recomputed states
    dweight, dB, dC = torch.zeros_like(weight), torch.empty_like(B), torch.empty_like(C)
    with on_device(x):
        order = _Topology(topology, reverse)
        edges = len(order.source)
        for start in range(0, n, block):
            part = slice(start, start + block)
            states = kept if kept.numel() else order.propagate(x, B, C, weight, part, unread, False)
            gradients = order.propagate(dy, C, B, weight, part, dx, True)
            size = gradients.shape[2]
            options: dict[str, Any] = {"ACC": _acc(weight)}
            padded, width = triton.next_power_of_2(size), heads // groups * headdim
            block_p = max(1, min(triton.next_power_of_2(width), 256 // padded))
            block_v = max(1, (16384 if INTERPRETED else 1024) // (padded * block_p))
            block_v = min(block_v, triton.next_power_of_2(nodes))
            _dag_maps_kernel[(triton.cdiv(nodes, block_v), groups)](
                x, dy, order.perm, states, gradients, dB, dC, nodes, start, n,
                WIDTH=width, COLUMNS=heads * headdim, GROUPS=groups, SIZE=size, PADDED=padded,
                BLOCK_V=block_v, BLOCK_P=block_p, **options,
            )  # fmt: skip
            if edges:
                block_r = min(triton.next_power_of_2(headdim * size), 128)
                block_e = min(triton.next_power_of_2(edges), max(1, (16384 if INTERPRETED else 1024) // block_r))
                _dag_edges_kernel[(triton.cdiv(edges, block_e), heads)](
                    order.source, order.target, order.edge, states, gradients, dweight, edges,
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
        return _forward(*arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstates: Tensor | None) -> tuple[Any, ...]:
        return DagScan.gradients(_DagScanGradient, ctx, dy)


class _DagScanGradient(DagScanGradient):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _backward(*arguments)
