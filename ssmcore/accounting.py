"""Parameters, operations and state of a model, part by part, as exact integers.

Multiplications and additions count one each: 2 w for a linear layer of w weights at one position, and for mixers what
their `flops` says. Norms, activations, residual additions and look-ups are not counted. A training step is three times
the forward pass. The state is that of one sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .mixers.common import MixerState, Mode, check_mode


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        name: Its place in the model, as in `named_modules`.
        kind: Name of its class.
        parameters: Numbers in its parameters; tied ones count where they come first.
        flops: Operations for one sequence, or one step.
        state_numel: Numbers in its state.
        state_bytes: Memory of its state.
    """

    name: str
    kind: str
    parameters: int
    flops: int
    state_numel: int = 0
    state_bytes: int = 0

    @property
    def intensity(self) -> float:
        """Operations per byte of state that a step reads and writes; infinite without a state."""
        return self.flops / (2 * self.state_bytes) if self.state_bytes else float("inf")


@dataclass(frozen=True)
class Account:
    """What `account` returns; str() is a table.

    Attributes:
        mode: "train", "prefill" or "decode".
        length: Positions of the sequence; for "decode" those before the step.
        parts: In the order of the model.
    """

    mode: Mode
    length: int
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(part.parameters for part in self.parts)

    @property
    def flops(self) -> int:
        """All operations for one sequence, or one step."""
        return sum(part.flops for part in self.parts)

    @property
    def state_numel(self) -> int:
        """Numbers in the whole state of one sequence."""
        return sum(part.state_numel for part in self.parts)

    @property
    def state_bytes(self) -> int:
        """Memory of the whole state of one sequence."""
        return sum(part.state_bytes for part in self.parts)

    def __str__(self) -> str:
        """A table of the parts and their sum."""
        total = Part("total", "", self.parameters, self.flops, self.state_numel, self.state_bytes)
        head = ("part", "kind", "parameters", "flops", "state", "state bytes")
        rows = [head]
        for part in (*self.parts, total):
            numbers = (part.parameters, part.flops, part.state_numel, part.state_bytes)
            rows.append((part.name, part.kind, *(f"{n:,}" for n in numbers)))  # type: ignore[arg-type]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = []
        for name, kind, *numbers_of in rows:
            cells = [name.ljust(widths[0]), kind.ljust(widths[1])]
            lines.append("  ".join(cells + [n.rjust(width) for n, width in zip(numbers_of, widths[2:])]))
        title = f"{self.mode}, {'after ' if self.mode == 'decode' else ''}{self.length:,} positions"
        return "\n".join([title, *lines])


def account(
    model: nn.Module,
    l: int,  # noqa: E741
    *,
    mode: Mode = "prefill",
    dtype: torch.dtype | None = None,
) -> Account:
    """Count parameters, operations and state of a model of sequence mixers.

    Args:
        model: A mixer, `Stack`, `SequenceModel` or any module around them that works position by position.
        l: Positions of the sequence; for "decode" those before the step.
        mode: "train" (forward and backward), "prefill" (forward) or "decode" (one step).
        dtype: Of the activations, for the memory of states; None: that of the parameters.

    Raises:
        ValueError: if the mode is unknown or `l` is below 1.
        TypeError: for "decode" of a model that is not causal.
    """
    check_mode(mode)
    if l < 1:
        raise ValueError(f"expected l of at least 1 position, got {l}.")
    seen: set[int] = set()
    return Account(mode, l, tuple(_parts(model, "", l, mode, dtype, seen)))


def _parts(
    module: nn.Module,
    name: str,
    l: int,  # noqa: E741
    mode: Mode,
    dtype: torch.dtype | None,
    seen: set[int],
) -> Iterator[Part]:
    label = name or type(module).__name__
    if _is_mixer(module):
        numel, nbytes = _state_size(module, l, dtype)
        flops = module.flops(l, mode=mode)  # type: ignore[operator]
        yield Part(label, type(module).__name__, _new_numel(module.parameters(), seen), flops, numel, nbytes)
    elif any(_is_mixer(part) for part in module.modules()):
        own = _new_numel(module.parameters(recurse=False), seen)
        if own:
            yield Part(label, type(module).__name__, own, 0)
        for child_name, child in module.named_children():
            yield from _parts(child, f"{name}.{child_name}".lstrip("."), l, mode, dtype, seen)
    else:
        weights = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
        flops = 2 * weights * {"train": 3 * l, "prefill": l, "decode": 1}[mode]
        numel = _new_numel(module.parameters(), seen)
        if numel or flops:
            yield Part(label, type(module).__name__, numel, flops)


def _is_mixer(module: nn.Module) -> bool:
    """Whether it is a sequence mixer by itself, and not one that is made of others with a state each."""
    if not hasattr(module, "flops") or not hasattr(module, "state_numel"):
        return False
    state_type = getattr(module, "state_type", None)
    return state_type is None or issubclass(state_type, MixerState)


def _state_size(mixer: Any, l: int, dtype: torch.dtype | None) -> tuple[int, int]:  # noqa: E741
    """Numbers and bytes of a mixer's state after l positions."""
    if not mixer.causal:
        return 0, 0
    # A state that grows is asked for with room for all positions.
    room = {"slots": l} if "slots" in inspect.signature(mixer.init_state).parameters else {}
    tensors = mixer.init_state(1, device="meta", dtype=dtype, **room).tensors().values()
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return sum(tensor.numel() for tensor in floating), sum(tensor.nbytes for tensor in floating)


def _new_numel(parameters: Iterator[nn.Parameter], seen: set[int]) -> int:
    found: list[Tensor] = []
    for parameter in parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found.append(parameter)
    return sum(parameter.numel() for parameter in found)
