"""Sequences over several processes: each holds one contiguous segment, and only states pass between them.

A linear recurrence over segment r is affine in the state it begins with: all processes scan at once and exchange
summaries (P_r, S_r), whose size does not depend on the length:

    S_out = P_r S_in + S_r;    S_in of rank r = sum_{k<r} (prod_{k<j<r} P_j) S_k

Dao & Gu (2024), "Transformers are SSMs", section 8. Other causal mixers hand over their states in turn.
"""

from __future__ import annotations

import json
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree

from .blocks import Residual, Stack
from .mixers import DiscreteMamba2, Mamba, Mamba2
from .mixers.memory import GatedMemoryUnit
from .parallel import DoubleMixer
from .sequence_model import SequenceModel

__all__ = ["SequenceRanks", "prefill_in_turn", "set_context_parallel"]


class SequenceRanks:
    """Processes that share sequences; the first segment lies on rank 0, the last one on the last rank.

    Args:
        group: Group of processes; None: all.

    Attributes:
        group: The group.
        rank: Number of this process in it.
        size: Number of processes.

    Raises:
        ValueError: if torch.distributed is not initialised, or this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "no group of processes: start with torchrun and call torch.distributed.init_process_group first."
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the group; make the group of all that share a sequence.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a group is a connection

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's segment of what all processes hold whole; lengths differ by at most one position."""
        return x.tensor_split(self.size, dim)[self.rank]

    def join(self, y: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence from the segments of all processes, on each of them.

        Differentiable: a segment's gradient is that of the sum of what all processes make of the whole.
        """
        lengths = self._all_gather(torch.tensor([y.shape[dim]], device=y.device)).flatten().tolist()
        y = y.movedim(dim, 0)
        padding = y.new_zeros(max(lengths) - y.shape[0], *y.shape[1:])
        parts = _Gather.apply(torch.cat([y, padding]), self, False)
        return torch.cat([part[:length] for part, length in zip(parts, lengths)]).movedim(0, dim)

    def inputs_before(self, x: Tensor, width: int, first: Tensor | None = None) -> Tensor:
        """The inputs of a causal convolution before this segment.

        Args:
            x: The segment, (b, l, c), l at least `width`.
            width: How many positions.
            first: What rank 0 is given, (b, c, width); zeros if None. Others have none.

        Returns:
            (b, c, width), oldest first; differentiable.

        Raises:
            ValueError: if the segment is shorter than that.
        """
        if x.shape[1] < max(width, 1):
            raise ValueError(
                f"a segment has {x.shape[1]} positions, and the next one's convolution sees {width} before it; use"
                " longer sequences or fewer processes."
            )
        # Rank 0 takes the last entry, which lies not before it and is zero.
        before = _Gather.apply(x[:, x.shape[1] - width :], self, True)[self.rank - 1].mT
        return before if first is None else before + first.to(before.dtype)

    def carry(self, log_decay: Tensor, state: Tensor) -> Tensor:
        """The state that this segment begins with, from the summaries of all segments before.

        Args:
            log_decay: Sum of the segment's log-decays, (b, ...), the leading dimensions of the state.
            state: State at the segment's end: from zero, on rank 0 from its real start; (b, h, p, n) or (b, d, n).

        Returns:
            Of the shape of `state`, zero on rank 0; differentiable.
        """
        dtype = torch.promote_types(log_decay.dtype, state.dtype)
        summary = torch.cat([log_decay.flatten(1).to(dtype), state.flatten(1).to(dtype)], dim=1)
        decays, states = _Gather.apply(summary, self, True).split([log_decay[0].numel(), state[0].numel()], dim=2)
        decays = decays.reshape(self.size, *log_decay.shape, *[1] * (state.dim() - log_decay.dim())).exp()
        start = torch.zeros_like(state, dtype=dtype)
        # Entries of this and later segments are zero, which changes nothing: every process runs, forward and backward,
        # the same exchanges.
        for decay, end in zip(decays, states.reshape(self.size, *state.shape)):
            start = decay * start + end
        return start

    def require_plain(self, state: Any, **arguments: Tensor | None) -> None:
        """Check that a call has nothing that segments cannot have.

        Raises:
            ValueError: if there is padding, packing or a reset, or a state on a rank above 0.
        """
        given = [name for name, value in arguments.items() if value is not None]
        if given:
            raise ValueError(
                f"`{given[0]}` is not possible where segments of a sequence are scanned at once; give whole rows of one"
                " length without it, or use prefill_in_turn."
            )
        if state is not None and self.rank:
            raise ValueError(f"rank {self.rank} begins with the state of the rank before; give a state to rank 0 only.")

    def _all_gather(self, x: Tensor) -> Tensor:
        """(size, *x.shape), not differentiable."""
        out = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(out.unbind()), x.contiguous(), group=self.group)
        return out


class _Gather(torch.autograd.Function):
    """Tensors of all processes, (size, *x.shape); or zeros in place of those not before this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: SequenceRanks, before_only: bool) -> Tensor:
        ctx.ranks, ctx.before_only = ranks, before_only
        return _masked(ranks._all_gather(x), ranks, before_only)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = _masked(grad.clone(memory_format=torch.contiguous_format), ctx.ranks, ctx.before_only)
        dist.all_reduce(grad, group=ctx.ranks.group)
        return grad[ctx.ranks.rank], None, None


def _masked(gathered: Tensor, ranks: SequenceRanks, before_only: bool) -> Tensor:
    if before_only:
        gathered[ranks.rank :] = 0
    return gathered


def set_context_parallel(model: nn.Module, ranks: SequenceRanks | None) -> None:
    """Let a model take segments of sequences, one on each process, and give what it would give on the whole.

    Outputs and gradients are those of one process. Gradients of parameters are each process's share: their sum is the
    whole gradient of the sum of all losses, their mean (which DDP takes) that of the mean. States that `prefill` gives
    are those at the end of the own segment, `position` of a stack counts the own segment only. `step` is as ever.

    Args:
        model: A mixer ("mamba2", "discrete_mamba2", "mamba"), a `Stack` or a `SequenceModel` of them; changed in place.
        ranks: The processes; None: whole sequences again.

    Raises:
        TypeError: if a layer cannot do this.
    """
    stack = model.stack if isinstance(model, SequenceModel) else model
    if isinstance(stack, Stack):
        mixers: list[nn.Module] = [block.mixer for block in stack.blocks if isinstance(block, Residual)]
    else:
        mixers = [model]
    parts = [(index, part) for index, mixer in enumerate(mixers) for part in _parts(mixer)]
    for index, part in parts:
        if type(part) not in (Mamba2, DiscreteMamba2, Mamba):  # subclasses may look elsewhere too, as HAX does
            place = f"layer {index} ({type(part).__name__})" if isinstance(stack, Stack) else type(part).__name__
            raise TypeError(
                f"{place} cannot scan segments at once; expected mamba2, discrete_mamba2 or mamba. prefill_in_turn"
                " passes the states of any causal model."
            )
    for _, part in parts:
        part.ranks = ranks  # type: ignore[assignment]


def _parts(mixer: nn.Module) -> list[nn.Module]:
    """The mixers that a layer is made of; a gated memory unit looks at one position only."""
    if isinstance(mixer, DoubleMixer):
        return [*_parts(mixer.first), *_parts(mixer.second)]
    return [] if isinstance(mixer, GatedMemoryUnit) else [mixer]


def prefill_in_turn(
    model: Any, x: Tensor, ranks: SequenceRanks, state: Any = None, *, pieces: int = 1, **arguments: Any
) -> tuple[Tensor, Any]:
    """`model.prefill` over segments on several processes: each waits for the state of the rank before.

    For any causal model: attention, hybrid stacks, mixers whose state is not affine. The batch is passed in pieces of
    rows, so that a rank works on a piece while the next one works on the piece before. Differentiable: gradients of
    states go back through the same connections, and each process has its share of the parameters' gradients. Then every
    process must call `backward` on a loss in which its outputs take part.

    Args:
        model: Anything with `prefill(x, state, **arguments)`.
        x: The segment, (b, l, ...); b the same on all ranks.
        ranks: The processes.
        state: To go on from; on rank 0 only.
        pieces: Number of pieces of the batch.
        **arguments: Handed to `prefill`; tensors have the batch in front.

    Returns:
        Outputs (b, l, ...), and the state after the segment; on the last rank that after the whole sequence.

    Raises:
        ValueError: if a rank above 0 is given a state, or the batch has fewer rows than pieces.
    """
    if state is not None and ranks.rank:
        raise ValueError(f"rank {ranks.rank} begins with the state of the rank before; give a state to rank 0 only.")
    if not 1 <= pieces <= x.shape[0]:
        raise ValueError(f"`pieces` must lie in 1 to the {x.shape[0]} rows of the batch, got {pieces}.")
    outputs, states = [], []
    for rows in torch.arange(x.shape[0], device=x.device).tensor_split(pieces):
        place = slice(int(rows[0]), int(rows[-1]) + 1)
        own = _receive(ranks, x.device) if ranks.rank else None if state is None else state.select(rows)
        given = {name: value[place] if isinstance(value, Tensor) else value for name, value in arguments.items()}
        y, after = model.prefill(x[place], own, **given)
        if ranks.rank < ranks.size - 1:
            y = y + _send(after, ranks).to(y.dtype)
        outputs.append(y)
        states.append(after)
    leaves = [_pytree.tree_flatten(part) for part in states]
    joined = [torch.cat(parts) for parts in zip(*(part for part, _ in leaves))]
    return torch.cat(outputs), _pytree.tree_unflatten(joined, leaves[0][1])


def _send(state: Any, ranks: SequenceRanks) -> Tensor:
    """Send a state to the next rank; the zero that comes back carries its gradient once it is added to an output."""
    leaves, spec = _pytree.tree_flatten(state)
    tracked = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    kinds = [(str(leaf.dtype).removeprefix("torch."), list(leaf.shape)) for leaf in leaves]
    note = json.dumps({"spec": _pytree.treespec_dumps(spec), "leaves": kinds, "tracked": tracked}).encode()
    device = leaves[0].device
    dist.send(torch.tensor([len(note)], device=device), group=ranks.group, group_dst=ranks.rank + 1)
    dist.send(torch.tensor(list(note), dtype=torch.uint8, device=device), group=ranks.group, group_dst=ranks.rank + 1)
    return _Send.apply(ranks, *leaves)


def _receive(ranks: SequenceRanks, device: torch.device) -> Any:
    """The state of the rank before."""
    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(size, group=ranks.group, group_src=ranks.rank - 1)
    note = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.recv(note, group=ranks.group, group_src=ranks.rank - 1)
    told = json.loads(bytes(note.tolist()))
    empty = [torch.empty(shape, dtype=getattr(torch, kind), device=device) for kind, shape in told["leaves"]]
    anchor = torch.zeros((), device=device, requires_grad=told["tracked"])
    leaves = _Receive.apply(ranks, anchor, *empty)
    return _pytree.tree_unflatten(leaves, _pytree.treespec_loads(told["spec"]))


class _Send(torch.autograd.Function):
    """Tensors to the next rank; gradients of the floating ones come back from it."""

    @staticmethod
    def forward(ctx: Any, ranks: SequenceRanks, *leaves: Tensor) -> Tensor:
        ctx.ranks = ranks
        ctx.save_for_backward(*leaves)
        for leaf in leaves:
            if leaf.numel():
                dist.send(leaf.contiguous(), group=ranks.group, group_dst=ranks.rank + 1)
        return leaves[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = []
        for leaf in ctx.saved_tensors:
            grads.append(torch.zeros_like(leaf, memory_format=torch.contiguous_format) if _has_grad(leaf) else None)
            if grads[-1] is not None:
                dist.recv(grads[-1], group=ctx.ranks.group, group_src=ctx.ranks.rank + 1)
        return None, *grads


class _Receive(torch.autograd.Function):
    """Tensors from the rank before; gradients of the floating ones go back to it."""

    @staticmethod
    def forward(ctx: Any, ranks: SequenceRanks, anchor: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        for leaf in leaves:
            if leaf.numel():
                dist.recv(leaf, group=ranks.group, group_src=ranks.rank - 1)
        ctx.mark_dirty(*leaves)
        ctx.mark_non_differentiable(*(leaf for leaf in leaves if not leaf.is_floating_point()))
        return leaves

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        for grad in grads:
            if _has_grad(grad):
                dist.send(grad.contiguous(), group=ctx.ranks.group, group_dst=ctx.ranks.rank - 1)
        return None, None, *[None] * len(grads)


def _has_grad(leaf: Tensor) -> bool:
    return leaf.is_floating_point() and leaf.numel() > 0
