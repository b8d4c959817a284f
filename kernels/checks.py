"""Named-dimension contracts of the ops, checked with messages that name tensor and dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from .transforms import transforming


def check_shapes(**named: tuple[Tensor | None, str]) -> dict[str, int]:
    """Check tensors against shapes written as dimension letters.

        sizes = check_shapes(b=(b, "b l d"), a=(a, "b l d?"), initial_state=(initial_state, "b d"))

    A letter (or word) stands for one size, bound by the first tensor that has it; digits are a fixed size; a trailing
    `?` also allows 1 (a dimension that broadcasts); a leading `...` stands for any further dimensions in front; absent
    tensors (None) are skipped.

    Args:
        **named: `name=(tensor, dimensions)`, the name as the caller of the op knows it.

    Returns:
        The size bound to each letter.

    Raises:
        TypeError: if something that is not a tensor was given.
        ValueError: if a number of dimensions or a size disagrees.
    """
    sizes: dict[str, int] = {}
    owners: dict[str, str] = {}
    for name, (tensor, dims) in named.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor of shape {_written(dims)}, got {type(tensor).__name__}.")
        letters = dims.removeprefix("...").split()
        leading = tensor.dim() - len(letters)
        if leading < 0 or (leading > 0 and not dims.startswith("...")):
            count = f"at least {len(letters)}" if dims.startswith("...") else f"{len(letters)}"
            raise ValueError(
                f"`{name}` must have {count} dimensions, {_written(dims)}; got shape {tuple(tensor.shape)}."
            )
        for axis, letter in enumerate(letters, start=leading):
            size = tensor.shape[axis]
            if letter.endswith("?"):
                if size == 1:
                    continue
                letter = letter[:-1]
            if letter.isdigit():
                expected, origin = int(letter), "always"
            elif letter in sizes:
                expected, origin = sizes[letter], f"from `{owners[letter]}`"
            else:
                sizes[letter], owners[letter] = size, name
                continue
            if size != expected:
                raise ValueError(
                    f"`{name}` has {letter}={size}, expected {expected} ({origin}); "
                    f"`{name}` is {_written(dims)}, got shape {tuple(tensor.shape)}."
                )
    return sizes


# Kinds of calls that have passed their checks, see `call_kind`.
_PASSED: set[tuple[object, ...]] = set()
_PLAIN = (type(None), bool, int, float, str)


def call_kind(op: str, *arguments: object) -> tuple[object, ...] | None:
    """What checks of shapes, dtypes, devices and options look at; they take longer than many kernels.

    Args:
        op: Its name.
        *arguments: All that its checks look at.

    Returns:
        The key for `known` and `remember`; None while tracing or for other classes, which are checked every time.
    """
    if torch.compiler.is_compiling():
        return None
    kinds = tuple(map(_kind, arguments))
    return None if None in kinds else (op, *kinds)


def known(kind: tuple[object, ...] | None) -> bool:
    """Whether a call of this kind has passed its checks."""
    return kind is not None and kind in _PASSED


def remember(kind: tuple[object, ...] | None) -> None:
    """Calls of this kind have passed their checks."""
    if kind is not None:
        if len(_PASSED) >= 4096:
            _PASSED.clear()
        _PASSED.add(kind)


def _kind(argument: object) -> tuple[object, ...] | None:
    if type(argument) in (Tensor, torch.nn.Parameter):
        return argument.shape, argument.dtype, argument.device  # type: ignore[attr-defined]
    return (type(argument), argument) if type(argument) in _PLAIN else None


def check_devices(**named: Tensor | None) -> torch.device:
    """Check that all tensors given lie on one device, and return it.

    Raises:
        ValueError: if two devices occur.
    """
    first: tuple[str, torch.device] | None = None
    for name, tensor in named.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(
                f"`{name}` is on device '{tensor.device}', expected '{first[1]}' (from `{first[0]}`); "
                "move all tensors of one call to the same device."
            )
    if first is None:
        raise ValueError("At least one tensor is needed to know the device.")
    return first[1]


def check_floating(*, allow_complex: bool = False, **named: Tensor | None) -> None:
    """Check that all tensors given are of floating dtype (or complex, where allowed).

    Raises:
        TypeError: if something that is not a tensor, or a tensor of another dtype, was given.
    """
    kinds = "floating or complex" if allow_complex else "floating"
    for name, tensor in named.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor of {kinds} dtype, got {type(tensor).__name__}.")
        if tensor is None or tensor.is_floating_point() or (allow_complex and tensor.is_complex()):
            continue
        raise TypeError(f"`{name}` must have a {kinds} dtype, got {tensor.dtype}; convert it first, e.g. x.float().")


def check_log_decays(**named: Tensor) -> None:
    """Check, on a CPU in eager mode, that logarithms of decays are not positive.

    Raises:
        ValueError: if one is.
    """
    for name, tensor in named.items():
        if readable(tensor) and (tensor > 0).any():
            raise ValueError(
                f"`{name}` must be <= 0, got {tensor[tensor > 0].max().item():.3g}; it is the logarithm of a decay, "
                "e.g. dt * A with a negative A."
            )


def readable(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be looked at for free: not on a GPU, when tracing, or under `torch.func`."""
    if torch.compiler.is_compiling() or transforming():
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


def check_state_index(state_index: Tensor | None, count: int) -> None:
    """Check which states of a pool rows take: integers, and on a CPU in eager mode that each is there and taken once.

    Args:
        state_index: The state of each row, (b,); negative for padding.
        count: States in the pool.

    Raises:
        TypeError: if they are no integers.
        ValueError: if there is no such state, or two rows take the same.
    """
    if state_index is None:
        return
    if state_index.is_floating_point() or state_index.is_complex() or state_index.dtype == torch.bool:
        raise TypeError(f"`state_index` must be a tensor of integers, got {state_index.dtype}.")
    if not readable(state_index):
        return
    taken = [index for index in state_index.tolist() if index >= 0]
    if taken and max(taken) >= count:
        raise ValueError(f"`state_index` names state {max(taken)}, the pool has {count}, numbered from 0.")
    if len(set(taken)) < len(taken):
        twice = next(index for index in taken if taken.count(index) > 1)
        raise ValueError(f"`state_index` names state {twice} more than once; a state belongs to one row of a call.")


def _written(dims: str) -> str:
    return "(" + ", ".join(dims.replace("?", "|1").split()) + ")"
