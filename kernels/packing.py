"""Packed rows: where sequences lie, and states before and after each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import readable

FinalStates = Literal["last", "segments"]


def cu_seqlens_to_seq_idx(cu_seqlens: Tensor, length: int) -> Tensor:
    """Number the positions of a packed row by their sequence; on the device, without waiting for it.

    Args:
        cu_seqlens: Where the sequences begin and, as the last entry, where the last one ends, (s + 1,) integers.
            Sequences may be empty.
        length: Positions of the row; those behind the last sequence are numbered s.

    Returns:
        (1, length) int32, to be used as `seq_idx`.

    Raises:
        TypeError: if `cu_seqlens` is no tensor of integers.
        ValueError: if it is not one-dimensional.
    """
    _check_cu_seqlens(cu_seqlens)
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True, out_int32=True)[None]


def check_seq_idx(seq_idx: Tensor | None) -> None:
    """Check the numbers of the sequences: integers, and on a CPU in eager mode that they do not decrease.

    Raises:
        TypeError: if they are no integers.
        ValueError: if they decrease along a row.
    """
    if seq_idx is None:
        return
    if seq_idx.is_floating_point() or seq_idx.is_complex() or seq_idx.dtype == torch.bool:
        raise TypeError(f"`seq_idx` must be a tensor of integers, got {seq_idx.dtype}.")
    if not readable(seq_idx):
        return
    falls = seq_idx[:, 1:] < seq_idx[:, :-1]
    if falls.any():
        row, position = falls.nonzero()[0].tolist()
        before, after = seq_idx[row, position : position + 2].tolist()
        raise ValueError(
            f"`seq_idx` must not decrease along a row, got {after} after {before} at position {position + 1} of row "
            f"{row}; number the sequences in their order."
        )


def read_packing(
    x: Tensor,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    final_states: FinalStates,
    initial_rows: int | None,
) -> tuple[Tensor | None, bool]:
    """What an op's packing arguments ask for.

    Args:
        x: Main input of the op, (b, l, ...).
        seq_idx: Its argument of that name.
        cu_seqlens: Its argument of that name.
        final_states: Its argument of that name.
        initial_rows: Rows of its initial state, None if there is none.

    Returns:
        The number of the sequence at each position, and whether the sequences have states of their own, so that
        `by_segments` has to be used.

    Raises:
        TypeError: if `cu_seqlens` is no tensor of integers.
        ValueError: if the arguments do not fit together.
    """
    if final_states not in ("last", "segments"):
        raise ValueError(f"final_states must be 'last' or 'segments', got {final_states!r}.")
    if cu_seqlens is None:
        if final_states == "segments":
            raise ValueError("final_states='segments' needs `cu_seqlens`, which says where the sequences lie.")
        return seq_idx, False
    _check_cu_seqlens(cu_seqlens)
    if seq_idx is not None:
        raise ValueError("give either `seq_idx` or `cu_seqlens`, not both.")
    if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] != 1:
        raise ValueError("`cu_seqlens` needs inputs of a single row, b=1; several rows take `seq_idx`.")
    each = final_states == "segments" or initial_rows not in (None, 1)
    return None if each else cu_seqlens_to_seq_idx(cu_seqlens.to(x.device), x.shape[1]), each


def by_segments(
    scan: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
    inputs: Mapping[str, Tensor | None],
    initial: tuple[Tensor, ...] | None,
    cu_seqlens: Tensor,
    final_states: FinalStates,
    *,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run an op on a packed row with a state before and after each sequence.

    Sequences of similar length, within a factor of two, become the rows of one call; the number of calls grows with
    the logarithm of the length, and padding at most doubles the work. Lengths are read on the host.

    Args:
        scan: `scan(count, initial, **rows)` -> outputs and the parts of the final state. Rows are padded with zeros,
            `count` (rows,) is the number of real positions, and zeros change no state.
        inputs: What has positions, (1, l, ...) each.
        initial: Parts of the initial state, (s, ...) or (1, ...) each; the latter enters the first sequence.
        cu_seqlens: (s + 1,).
        final_states: "segments" for the states after all sequences, "last" for that after the last one.
        reverse: Whether the scan runs from the end, and the last sequence counts as the first.

    Returns:
        Outputs (1, l, ...), and the parts of the states, (s, ...) or (1, ...).

    Raises:
        ValueError: if sequences do not cover the row in order, or a size disagrees.
    """
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    first, length = next(iter(given)), next(iter(given.values())).shape[1]
    for name, tensor in given.items():
        if tensor.shape[:2] != (1, length):
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, expected (1, {length}, ...) as `{first}` with `cu_seqlens`."
            )
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if not lengths or bounds[0] != 0 or bounds[-1] != length or min(lengths) < 0:
        raise ValueError(f"`cu_seqlens` must grow from 0 to l={length}, got {_shortened(bounds)}.")
    device = next(iter(given.values())).device
    if initial is not None:
        initial = tuple(_for_each(part, len(lengths), reverse) for part in initial)

    groups: dict[int, list[int]] = {}
    for segment, size in enumerate(lengths):
        groups.setdefault(size.bit_length(), []).append(segment)
    starts, counts = (torch.tensor(values, dtype=torch.long, device="cpu") for values in (bounds[:-1], lengths))
    places, outputs, found = [], [], []
    for members in groups.values():
        # Indices are worked out on the host, so that none has to be looked for on the device.
        chosen = torch.tensor(members, device="cpu")
        offsets = torch.arange(max(lengths[member] for member in members), device="cpu")
        real = offsets < counts[chosen, None]
        index = torch.where(real, starts[chosen, None] + offsets, 0)
        places.append(index[real])
        kept, index, chosen = (part.to(device) for part in (real.flatten().nonzero()[:, 0], index, chosen))
        real, count = real.to(device), counts[members].to(device)
        rows = {
            name: torch.where(real.view(*real.shape, *[1] * (tensor.dim() - 2)), tensor[0, index], 0)
            for name, tensor in given.items()
        }
        before = None if initial is None else tuple(part.index_select(0, chosen) for part in initial)
        y, final = scan(count, before, **rows)
        outputs.append(y.flatten(0, 1).index_select(0, kept))
        found.append(final)
    back = torch.cat(places).argsort().to(device)
    order = starts.new_tensor([member for members in groups.values() for member in members]).argsort().to(device)
    states = tuple(torch.cat(parts).index_select(0, order) for parts in zip(*found, strict=True))
    if final_states == "last":
        states = tuple(part[:1] if reverse else part[-1:] for part in states)
    return torch.cat(outputs).index_select(0, back)[None], states


def _for_each(part: Tensor, count: int, reverse: bool) -> Tensor:
    """A state per sequence; a single one is that of the first."""
    if part.shape[0] == 1 and count > 1:
        others = part.new_zeros(count - 1, *part.shape[1:])
        return torch.cat([others, part] if reverse else [part, others])
    if part.shape[0] != count:
        raise ValueError(f"`initial_state` has {part.shape[0]} rows, expected 1 or s={count} (from `cu_seqlens`).")
    return part


def _check_cu_seqlens(cu_seqlens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"`cu_seqlens` must be a tensor of integers, got {kind}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"`cu_seqlens` must be (s + 1,), got shape {tuple(cu_seqlens.shape)}.")


def _shortened(bounds: list[Any]) -> str:
    return str(bounds) if len(bounds) <= 8 else f"[{', '.join(map(str, bounds[:4]))}, ..., {bounds[-1]}]"
