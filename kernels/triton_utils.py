"""What the Triton launchers of several ops share.

Imported by `triton_impl` modules only, so that Triton stays optional.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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
    return max(1, min(cdiv(wanted, programs), length // shortest))


_NOTHING = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current, since Triton launches on the current one."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up. That of Triton costs microseconds a call."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not smaller, for positive numbers; see `cdiv`."""
    return 1 << (number - 1).bit_length()


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is not of stride 1 (or offsets in a tile would exceed 31 bits)."""
    if (tensor.stride(-1) == 1 or tensor.shape[-1] <= 1) and tensor.stride(-2) < 2**23:
        return tensor
    return tensor.contiguous()


class _Recording(threading.local):
    """Who takes launches down in this thread, an object with `launch`: see `replay.py`."""

    by: Any = None


recording = _Recording()


class quick:  # noqa: N801
    """Decorator of a Triton kernel that makes launches like an earlier one cheap for the host.

    Triton looks every launch up by all that it specialises on, which takes longer than many kernels run. Here a key of
    dtypes, alignments, integers and options leads to the compiled kernel at once.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._found: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
        # On AMD Triton also compiles for the size of what an address leads to.
        self._plain = INTERPRETED or torch.version.hip is not None
        parameters = () if INTERPRETED else kernel.params
        self._roles = tuple("constant" if p.is_constexpr else "any" if p.do_not_specialize else "" for p in parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["kernel"], name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        if recording.by is not None:
            return functools.partial(self._record, grid)
        return self.kernel[grid] if self._plain else functools.partial(self._launch, grid)

    def _record(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> object:
        return recording.by.launch(self, grid, arguments, options)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> object:
        active = triton.runtime.driver.active
        device = active.get_current_device()
        # What Triton compiles for: kinds of tensors, integers by what is known of them, constants themselves.
        key: list[Any] = [device]
        # Addresses instead of tensors spare the launch a question to the driver about each.
        passed: list[Any] = []
        for argument, role in zip(arguments, self._roles):
            kind = type(argument)
            if kind is int:
                if role == "constant":
                    key.append(argument)
                elif role == "any":
                    key.append(-0x80000000 <= argument <= 0x7FFFFFFF)
                else:
                    key.append((argument == 1, argument & 15 == 0, -0x80000000 <= argument <= 0x7FFFFFFF))
                passed.append(argument)
            elif kind is Tensor or isinstance(argument, Tensor):
                address = argument.data_ptr()
                key.append(argument.dtype)
                key.append(address & 15)
                passed.append(address)
            else:
                key.append(kind)
                key.append(argument)
                passed.append(argument)
        place = (*key, *options, *options.values())
        found = self._found.get(place) if direct() else None
        if found is None:
            kernel = self.kernel[grid](*arguments, **options)
            named = self.kernel.arg_names[len(arguments) :]
            if all(name in options for name in named):  # none has a default
                self._found[place] = kernel, tuple(options[name] for name in named)
            return kernel
        kernel, constants = found
        kernel.run(
            grid[0], grid[1] if len(grid) > 1 else 1, grid[2] if len(grid) > 2 else 1,
            active.get_current_stream(device), kernel.function, kernel.packed_metadata, None, None, None, *passed,
            *constants,
        )  # fmt: skip
        return kernel


def launching(kernel: quick, grid: tuple[int, ...], *numbers: int, **options: Any) -> Callable[..., None]:
    """What launches a kernel with the tensors it is called with.

    Args:
        kernel: Whose first arguments are the tensors.
        grid: Programs.
        *numbers: Arguments after the tensors.
        **options: Compile-time arguments.
    """

    def launch(*tensors: Tensor | None) -> None:
        kernel[grid](*tensors, *numbers, **options)

    return launch


def direct() -> bool:
    """Whether a compiled kernel is launched at once: not in the interpreter, on AMD, or while launches are seen."""
    if INTERPRETED or torch.version.hip is not None or recording.by is not None:
        return False
    before, after = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return not (getattr(before, "calls", before) or getattr(after, "calls", after))
