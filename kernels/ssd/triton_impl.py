"""`ssd` in Triton: custom ops and the autograd function around the launchers of its kernels.

Forward is one kernel with the state in registers. Where rows and heads give too few programs, rows are cut into parts:
one sweep finds what each part adds to its state, a small kernel carries the states over the parts, and the forward
kernel starts each part from its own. Backward is one launch of two sweeps, states from the left and their gradients
from the right, written between all chunks, and two kernels: one for all gradients of a chunk but those of B and C, one
for these. Only the inputs are kept for it. Sums over programs go through a buffer and one ordered reduction: no
atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..replay import replayed
from ..transforms import FirstDerivative, apply, call, fold, operator, unfold
from ..triton_utils import on_device
from .op import heads_per_head, in_dtype
from .triton_gradients import empty_gradients, run_gradients
from .triton_outputs import Sweep, contiguous, dense_rows, run_outputs


def ssd_triton(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `ssd`; everything but x, B and C has the dtype of the sums."""
    dtype, sums = x.dtype, log_decay.dtype
    narrow = sums if sums == torch.float64 else torch.promote_types(torch.promote_types(dtype, B.dtype), C.dtype)
    x, B, C = (in_dtype(one, narrow) for one in (x, B, C))
    batch, length, nheads, headdim = x.shape
    cut = heads_per_head(headdim, B.shape[3])
    assert cut is not None  # checked by the op
    if cut > 1:
        x = x.reshape(batch, length, nheads * cut, headdim // cut)
        log_decay = log_decay.repeat_interleave(cut, dim=2)
        weight = None if weight is None else weight.repeat_interleave(cut, dim=2)
        D = None if D is None else D.repeat_interleave(cut, dim=-1)
        state = None if state is None else state.reshape(batch, nheads * cut, headdim // cut, -1)
    y, final = apply(_Ssd, x, log_decay, B, C, state, weight, D, seq_idx)
    if cut > 1:
        y, final = y.reshape(batch, length, nheads, headdim), final.reshape(batch, nheads, headdim, -1)
    return in_dtype(y, dtype), final


@operator("ssd_triton_fwd")
@replayed
def _forward(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """`chunk` and `parts` (of a row) are 0 to be chosen."""
    x, B, C = dense_rows(x), dense_rows(B), dense_rows(C)
    log_decay, state, weight, seq_idx = (
        log_decay.contiguous(),
        contiguous(state),
        contiguous(weight),
        contiguous(seq_idx),
    )
    D = D if D is None or D.stride(2) == 1 else D.contiguous()
    y, final = x.new_empty(x.shape), log_decay.new_empty(x.shape[0], *x.shape[2:], B.shape[3])
    with on_device(x):
        run_outputs(Sweep(x, B, log_decay, weight, state, 0), C, D, seq_idx, y, final, chunk, parts)
    return y, final


@torch.library.register_fake("ssm::ssd_triton_fwd")
def _(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), log_decay.new_empty(x.shape[0], x.shape[2], x.shape[3], B.shape[3])


@operator("ssd_triton_bwd")
@replayed
def _backward(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    chunk: int,
    parts: int,
    blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay, B, C, state, weight and D.

    Those of absent weights and D have no positions, that of an absent state no heads.
    """
    x, B, C, dy = dense_rows(x), dense_rows(B), dense_rows(C), dy.contiguous()
    log_decay, state, weight, seq_idx = (
        log_decay.contiguous(),
        contiguous(state),
        contiguous(weight),
        contiguous(seq_idx),
    )
    D = D if D is None or D.stride(2) == 1 else D.contiguous()
    sweep = Sweep(x, B, log_decay, weight, state, 0)
    found = empty_gradients(sweep, C, D, with_state=state is not None)
    with on_device(x):
        run_gradients(
            sweep, C, D, seq_idx, dy, contiguous(dfinal), found, chunk=chunk, parts=parts, blocks=blocks
        )  # fmt: skip
    return found.dx, found.dlog_decay, found.dB, found.dC, found.dstate, found.dweight, found.dD


@torch.library.register_fake("ssm::ssd_triton_bwd")
def _(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    chunk: int,
    parts: int,
    blocks: int,
) -> tuple[Tensor, ...]:
    absent = x.shape[0], 0, x.shape[2]
    return (
        *(tensor.new_empty(tensor.shape) for tensor in (x, log_decay, B, C)),
        log_decay.new_empty(x.shape[0], 0 if state is None else x.shape[2], x.shape[3], B.shape[3]),
        *(log_decay.new_empty(absent if tensor is None else log_decay.shape) for tensor in (weight, D)),
    )


class _Ssd(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor | None,
        weight: Tensor | None,
        D: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        D = None if D is None else D.expand(log_decay.shape)
        found: tuple[Tensor, Tensor] = call(_forward, x, log_decay, B, C, state, weight, D, seq_idx, 0, 0)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, log_decay, B, C, state, weight, D, seq_idx = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x)
        wide = None if D is None else D.expand(log_decay.shape)
        found = apply(_SsdGradient, x, log_decay, B, C, state, weight, wide, seq_idx, dy, dfinal)
        *first, dstate, dweight, dD = found
        if D is not None and D.dim() == 1:
            dD = dD.sum((0, 1))
        optional = (None if given is None else one for given, one in ((state, dstate), (weight, dweight), (D, dD)))
        return *first, *optional, None


class _SsdGradient(FirstDerivative):
    name = "ssd"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return call(_backward, *arguments, 0, 0, 0)


def mapped(op: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Batching rule of an op all of whose tensors have the batch first: the mapped dimension joins it."""
    count = info.batch_size
    folded = [
        fold(argument, dim, count) if isinstance(argument, Tensor) else argument
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    outputs = tuple(unfold(output, count) for output in op(*folded))
    return outputs, (0,) * len(outputs)


@torch.library.register_vmap("ssm::ssd_triton_fwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return mapped(_forward, info, in_dims, arguments)


@torch.library.register_vmap("ssm::ssd_triton_bwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return mapped(_backward, info, in_dims, arguments)
