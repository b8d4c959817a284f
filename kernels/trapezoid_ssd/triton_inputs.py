"""What the launchers of `trapezoid_ssd` share: its inputs as kernels read them, and the angles where chunks begin."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..ssd.triton_outputs import contiguous, dense_rows
from ..triton_utils import cdiv, next_power_of_2
from .triton_kernels import _trapezoid_angle_kernel, _trapezoid_phases_kernel


class Inputs(NamedTuple):
    """The inputs as the kernels read them; keys and queries are (b, l * r, g, n), their biases (h, r, n)."""

    x: Tensor
    log_decay: Tensor
    gamma: Tensor
    beta: Tensor
    rate: Tensor
    B: Tensor
    C: Tensor
    state: Tensor | None
    phi: Tensor | None
    B_bias: Tensor
    C_bias: Tensor
    D: Tensor
    x_rank: Tensor | None
    seq_idx: Tensor | None

    @property
    def ranks(self) -> int:
        return self.B_bias.shape[1]

    def cut(self, rows: slice) -> Inputs:
        """The same for some rows of the batch."""
        whole = ("B_bias", "C_bias", "D", "x_rank")
        return Inputs(*(one if one is None or name in whole else one[rows] for name, one in self._asdict().items()))


def readable(*tensors: Tensor | None) -> Inputs:
    """Dense in the dimensions that the kernels take for granted: heads and width of x, B and C, all of the others."""
    given = Inputs(*tensors)  # type: ignore[arg-type]
    dense: dict[str, Any] = {
        name: contiguous(tensor) for name, tensor in given._asdict().items() if name not in ("x", "B", "C")
    }
    return given._replace(x=dense_rows(given.x), B=dense_rows(given.B), C=dense_rows(given.C), **dense)


def angles_of_chunks(given: Inputs, chunk: int) -> Tensor:
    """Angles up to each chunk, and after the last one, (b, h, chunks + 1, s), in half turns from 0 to 2."""
    (batch, positions, nheads, _), pairs = given.x.shape, given.rate.shape[2]
    chunks = cdiv(given.B.shape[1], chunk)
    phases = given.log_decay.new_empty(batch, nheads, chunks + 1, pairs)
    block_heads = min(8, nheads)
    _trapezoid_angle_kernel[(batch * chunks * cdiv(nheads, block_heads),)](
        given.gamma, given.beta, given.rate, given.phi, phases, positions, nheads, block_heads,
        HAS_PHI=given.phi is not None, S=pairs, Q=chunk // given.ranks, BLOCK_S=next_power_of_2(pairs),
        ACC=tl.float64 if phases.dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    together = min(4, next_power_of_2(pairs))
    _trapezoid_phases_kernel[(batch * nheads * cdiv(pairs, together),)](
        phases, chunks + 1, S=pairs, COUNT=min(1024, next_power_of_2(chunks + 1)), PAIRS=together
    )
    return phases
