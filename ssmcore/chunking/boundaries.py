"""What lies between router and inner network: chunks of a sequence, their way back, and the loss on their rate.

    z   = x at the boundaries
    h_j = (1 - P_j) h_{j-1} + P_j z_j,    P_j the router's probability at the j-th boundary
    u_t = h_{J(t)},                       J(t) the last boundary at or before t

Hwang, Wang & Gu (2025), sections 2.2 and 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from ...kernels import ema_scan
from ..mixers.common import padding_behind

Layout = Literal["padded", "flat"]
"""How chunks lie in memory: rows padded to the longest, or all in one row with `seq_idx`."""

# Published weights were trained with this clamp; it also acts on the first chunk of a sequence.
P_MIN = 1e-4


@dataclass(frozen=True)
class Boundaries:
    """What a router says about each position.

    Attributes:
        prob: Probability of a boundary, (b, l) float32 (float64 for float64 inputs); 1 where a sequence begins.
        mask: Whether a chunk begins here, (b, l) bool; never at padding.
        confidence: Probability of what was decided, (b, l), in [1/2, 1].
        real: Which positions are no padding, (b, l) bool; None if all.
    """

    prob: Tensor
    mask: Tensor
    confidence: Tensor
    real: Tensor | None = None


@dataclass(frozen=True)
class Chunks:
    """One vector per chunk, and where it came from.

    Attributes:
        x: Vectors, (b, m, d), m the largest count of the batch; in the flat layout (1, sum of counts, d).
        index: Position of each chunk's first element in its row, (b, m); flat: in the flattened batch, (sum,).
        mask: Which chunks are real, (b, m) bool, the real ones first; None if all are.
        seq_idx: Which packed sequence a chunk belongs to, int32; None without packing, always set in the flat layout.
        counts: Chunks per row, (b,) int64.
        max_count: The largest of them.
        fresh: Rows whose first chunk lies behind the first packed sequence, so that no state of before reaches it, (b,)
            bool; None without packing, and in the flat layout.
    """

    x: Tensor
    index: Tensor
    mask: Tensor | None
    seq_idx: Tensor | None
    counts: Tensor
    max_count: int
    fresh: Tensor | None = None


for _state in (Boundaries, Chunks):
    register_dataclass(_state)


def chunk(x: Tensor, boundaries: Boundaries, *, seq_idx: Tensor | None = None, layout: Layout = "padded") -> Chunks:
    """Keep the vectors at the boundaries, in order.

    Args:
        x: Sequence, (b, l, d).
        boundaries: Where chunks begin.
        seq_idx: Which packed sequence a position belongs to, (b, l) integers.
        layout: "padded" keeps rows, (b, m, d); "flat" puts all chunks in one row with a `seq_idx` and needs a boundary
            at the first real position of each row.

    Raises:
        ValueError: for an unknown layout.
    """
    batch, length, width = x.shape
    mask = boundaries.mask
    counts = mask.sum(1)
    if layout == "flat":
        index = mask.flatten().nonzero()[:, 0]
        return Chunks(
            x.flatten(0, 1)[index][None], index, None, _flat_seq_idx(x, seq_idx)[index][None], counts, len(index)
        )
    if layout != "padded":
        raise ValueError(f"`layout` must be 'padded' or 'flat', got {layout!r}.")
    # The one wait for the device: all sizes of the stage at once.
    most, least = torch.stack([counts.max(), counts.min()]).tolist() if batch else (0, 0)
    positions = torch.arange(length, device=x.device).expand(batch, length)
    slot = torch.where(mask, mask.cumsum(1) - 1, most)  # non-boundaries go to a slot that is cut off
    index = positions.new_zeros(batch, most + 1).scatter(1, slot, positions)[:, :most]
    real = None if most == least else padding_behind(counts, most)
    packed = fresh = None
    if seq_idx is not None:
        packed = seq_idx.gather(1, index)
        fresh = (packed[:, :1] != seq_idx[:, :1]).any(1) & (counts > 0)
        if real is not None:  # padding continues the last sequence
            packed = torch.where(real, packed, seq_idx[:, :1]).cummax(1).values
        packed = packed.to(torch.int32)
    vectors = x.gather(1, index[..., None].expand(-1, -1, width))
    return Chunks(vectors, index, real, packed, counts, most, fresh)


def _flat_seq_idx(x: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Number of the packed sequence in the whole batch, (b * l,) int32."""
    batch, length = x.shape[:2]
    starts = torch.zeros(batch, length, dtype=torch.bool, device=x.device)
    starts[:, :1] = True
    if seq_idx is not None:
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return (starts.flatten().cumsum(0) - 1).to(torch.int32)


def dechunk(z: Tensor, boundaries: Boundaries, chunks: Chunks, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Smooth the chunks and give each position the value of its chunk.

    Args:
        z: Output of the inner network, shape of `chunks.x` up to the last dimension.
        boundaries: As given to `chunk`.
        chunks: As returned by it; the vectors are not read.
        state: Smoothed value before the first position, (b, d), for the first packed sequence of each row; zeros if
            None. Not in the flat layout.

    Returns:
        u, (b, l, d), and the value after the last position, (b, d), both float32 (float64 for float64 inputs).
        Positions before the first boundary read the state.

    Raises:
        ValueError: if a state comes with the flat layout.
    """
    mask, (batch, length) = boundaries.mask, boundaries.mask.shape
    flat = chunks.index.dim() == 1
    if flat and state is not None:
        raise ValueError("the flat layout begins all sequences anew; use layout='padded' to continue from a state.")
    dtype = torch.promote_types(z.dtype, boundaries.prob.dtype)
    prob = boundaries.prob.flatten()[chunks.index][None] if flat else boundaries.prob.gather(1, chunks.index)
    prob = prob.clamp(P_MIN, 1 - P_MIN)
    if chunks.mask is not None:
        prob = prob * chunks.mask  # weight 0 leaves the mean as it is
    begin = state if state is None or chunks.fresh is None else state * ~chunks.fresh[:, None]
    with torch.autocast(z.device.type, enabled=False):  # the means stay wide
        smooth, last = ema_scan(z.to(dtype), prob, begin, seq_idx=chunks.seq_idx)
    if flat:
        place = (mask.flatten().cumsum(0) - 1).clamp(min=0)
        u = smooth[0][place].unflatten(0, (batch, length))
        last = smooth[0][(chunks.counts.cumsum(0) - 1).clamp(min=0)]
    else:
        before = smooth.new_zeros(batch, 1, smooth.shape[-1]) if state is None else state.to(dtype)[:, None]
        place = mask.cumsum(1)  # one more than J(t): the state stands in front
        u = torch.cat([before, smooth], dim=1).gather(1, place[..., None].expand(-1, -1, smooth.shape[-1]))
    return u, last


def straight_through(confidence: Tensor) -> Tensor:
    """Exactly 1, with the gradient and shape of `confidence`.

    Source: Hwang, Wang & Gu (2025), equation (7).
    """
    return 1 + (confidence - confidence.detach())


def ratio_loss(boundaries: Boundaries, target: float, *, sync: bool = False) -> Tensor:
    """Loss that draws the rate of boundaries to 1 / target.

        F = mean of the boundaries,  G = mean of their probabilities, over all real positions
        loss = N / (N - 1) ((N - 1) F G + (1 - F)(1 - G)),    1 at F = G = 1 / N

    Args:
        boundaries: Of one stage.
        target: Elements per chunk N aimed at, above 1.
        sync: Average F and G over all processes instead of over this one's batch.

    Returns:
        A scalar; its gradient flows through the probabilities only.

    Raises:
        ValueError: if the target is not above 1.

    Source: Hwang, Wang & Gu (2025), equation (10).
    """
    if target <= 1:
        raise ValueError(f"a target counts elements per chunk and lies above 1, got {target}.")
    rate, mean = _rate_and_mean(boundaries)
    if sync and torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.nn.functional import all_reduce

        world = torch.distributed.get_world_size()
        rate, mean = all_reduce(rate) / world, all_reduce(mean) / world
    return target / (target - 1) * ((target - 1) * rate * mean + (1 - rate) * (1 - mean))


def _rate_and_mean(boundaries: Boundaries) -> tuple[Tensor, Tensor]:
    prob, mask = boundaries.prob, boundaries.mask.to(boundaries.prob.dtype)
    if boundaries.real is None:
        return mask.mean(), prob.mean()
    count = boundaries.real.sum().clamp(min=1)
    return mask.sum() / count, (prob * boundaries.real).sum() / count


@torch.no_grad()
def chunk_stats(stages: Sequence[Boundaries]) -> dict[str, Tensor]:
    """Rates of all stages, outermost first, as scalars on the device.

    Args:
        stages: Boundaries of each stage of one pass.

    Returns:
        For stage s "stage{s}/rate" (share of positions that begin a chunk), "stage{s}/prob" (mean probability) and
        "stage{s}/chunk_length" (1 / rate); "chunk_length", positions of the whole input per innermost chunk.
    """
    stats: dict[str, Tensor] = {}
    whole: Tensor | float = 1.0
    for s, boundaries in enumerate(stages):
        rate, mean = _rate_and_mean(boundaries)
        stats |= {f"stage{s}/rate": rate, f"stage{s}/prob": mean, f"stage{s}/chunk_length": 1 / rate}
        whole = whole / rate
    return stats | {"chunk_length": torch.as_tensor(whole)}
