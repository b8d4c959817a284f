"""What the Triton launchers of several ops share.

Imported by `triton_impl` modules only, so that Triton stays optional.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Without a GPU the interpreter runs the kernels; it pays per operation and not per element, so tiles are made longer.
INTERPRETED: bool = type(tl.cdiv).__name__ == "InterpretedFunction"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a device; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def parts_of_length(programs: int, length: int, device: torch.device, shortest: int) -> int:
    """Into how many parts to cut a sequence so that a grid of `programs` fills the device.

    Args:
        programs: Programs without a cut.
        length: Positions.
        device: Where it runs.
        shortest: Shortest part that is worth its own program.
    """
    wanted = 4 * multiprocessors(device)
    if programs >= wanted // 2:
        return 1
    return max(1, min(triton.cdiv(wanted, programs), length // shortest))


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current, since Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is not of stride 1 (or offsets in a tile would exceed 31 bits)."""
    if (tensor.stride(-1) == 1 or tensor.shape[-1] <= 1) and tensor.stride(-2) < 2**23:
        return tensor
    return tensor.contiguous()
