"""What was recorded of a launcher, written as one Python function without decisions, loops or look-ups.

Its lines are allocations, torch's ops and launches, in their order. Kernels get addresses, so views that nothing but
kernels read are not made, and temporaries that nothing else reads are pieces of one allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import triton

from .triton_utils import INTERPRETED, quick


class Place(NamedTuple):
    """A tensor of a call: which of its values."""

    number: int


class Value(NamedTuple):
    """A tensor while it is recorded."""

    address: int  # where it begins
    storage: int  # where the memory begins that it lies in
    root: int  # the value whose memory it lies in: itself if it is no view
    offset: int  # bytes from where the root begins


class Allocation(NamedTuple):
    """An uninitialised tensor."""

    number: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Op(NamedTuple):
    """A call of one of torch's ops."""

    function: Any
    args: Any
    kwargs: Any
    several: bool
    outputs: list[Place]
    view: bool


class Launch(NamedTuple):
    """A launch of a kernel."""

    kernel: quick
    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


Step = Allocation | Op | Launch

# Temporaries of up to so many bytes together are one allocation, which lives from the first to the last use of any.
_TOGETHER = 2**25
_ALIGNED = 512  # as torch's allocator does
# On the current GPU, quicker for the host than `torch.empty_strided`: what code of torch.compile calls, not public.
_empty_strided_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


class Source:
    """A recorded call.

    Args:
        arguments: Arguments of the call, with places for tensors.
        values: All tensors of the call.
        steps: What was done.
        returned: Tree of what the call returned, with places for tensors.

    Attributes:
        lines: Of the function.
        run: The function, of the same arguments as the call; what is no tensor is not looked at.
    """

    def __init__(self, arguments: tuple[Any, ...], values: list[Value], steps: list[Step], returned: Any) -> None:
        self._names: dict[str, Any] = {}
        self._values, self._arguments = values, places(arguments)
        steps, last, made = _needed(len(self._arguments), values, steps, returned)
        self._addressed = {number for step in steps for number in self._pointers(step)}
        pieces = {} if INTERPRETED else _pieces(values, steps, last, made)
        self._pieces, self._total = pieces, max((begin + size for begin, size in pieces.values()), default=0)
        self._launches = any(isinstance(step, Launch) for step in steps)
        self.lines = [
            f"def run({', '.join(_parameter(*one) for one in enumerate(arguments))}):",
            *(" " + line for line in self._unpacked(arguments)),
            *(" " + line for line in self._body(steps, last)),
            f" return {self._tree(returned)}",
        ]
        self.run = _function(self.lines, self._names)

    def _unpacked(self, arguments: tuple[Any, ...]) -> Iterator[str]:
        for at, one in enumerate(arguments):
            if type(one) is list and one:
                yield (
                    ", ".join(_parameter(f"{at}_{k}", each) for k, each in enumerate(one))
                    + f", = {_parameter(at, one)}"
                )
        for number in self._arguments:
            yield from self._address(number)

    def _body(self, steps: list[Step], last: dict[int, int]) -> Iterator[str]:
        if self._launches and not INTERPRETED:
            yield f"stream = {self._constant(_stream_of_current)}()"
        if self._pieces:
            first = min(at for at, step in enumerate(steps) if _made(step) & self._pieces.keys())
            final = max(last[number] for number in self._pieces)
        for at, step in enumerate(steps):
            if self._pieces and at == first:
                some = next(step for step in steps if isinstance(step, Allocation) and step.number in self._pieces)
                yield f"together = {self._empty((self._total,), (1,), torch.uint8, some.device)}"
                yield "base = together.data_ptr()"
            if isinstance(step, Allocation):
                if step.number in self._pieces:
                    yield f"a{step.number} = base + {self._pieces[step.number][0]}"
                else:
                    yield f"v{step.number} = {self._empty(step.shape, step.stride, step.dtype, step.device)}"
                    yield from self._address(step.number)
            elif isinstance(step, Op):
                yield from self._operation(step)
            else:
                yield self._launch(step)
            gone = [number for number, end in last.items() if end == at and number not in self._pieces]
            if self._pieces and at == final:
                gone.append(-1)
            if gone:
                yield "del " + ", ".join("together" if number < 0 else f"v{number}" for number in gone)

    def _operation(self, step: Op) -> Iterator[str]:
        function = self._constant(getattr(step.function, "_op", step.function))
        given = [self._tree(one) for one in step.args]
        given += [f"{name}={self._tree(one)}" for name, one in step.kwargs.items()]
        outputs = [one.number for one in step.outputs]
        call = f"{function}({', '.join(given)})"
        if not outputs:
            yield call
        else:
            names = ", ".join(f"v{number}" for number in outputs)
            yield f"{names}{',' if step.several else ''} = {call}"
        for number in outputs:
            yield from self._address(number)

    def _launch(self, step: Launch) -> str:
        if INTERPRETED:
            given = ", ".join(self._tree(one) for one in step.arguments)
            return f"{self._constant(step.kernel.kernel)}[{step.grid}]({given}, **{self._constant(step.options)})"
        compiled = step.compiled
        grid = *step.grid, *(1,) * (3 - len(step.grid))
        before = *grid, "stream", self._constant(compiled.function), self._constant(compiled.packed_metadata)
        given = ", ".join(self._pointer(one) if type(one) is Place else self._tree(one) for one in step.arguments)
        return f"{self._constant(compiled.run)}({', '.join(map(str, before))}, None, None, None, {given})"

    def _empty(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
        given = f"{tuple(shape)}, {tuple(stride)}, {self._constant(dtype)}"
        if device.type == "cuda" and _empty_strided_cuda is not None:
            return f"{self._constant(_empty_strided_cuda)}({given})"
        place = self._constant(device)
        given = f"{tuple(shape)}, {tuple(stride)}, dtype={self._constant(dtype)}, device={place}"
        return f"{self._constant(torch.empty_strided)}({given})"

    def _address(self, number: int) -> Iterator[str]:
        if number in self._addressed:
            yield f"a{number} = v{number}.data_ptr()"

    def _pointers(self, step: Step) -> set[int]:
        """The values whose addresses a step needs."""
        if INTERPRETED or not isinstance(step, Launch):
            return set()
        return {self._values[number].root for number in places(step.arguments)}

    def _pointer(self, place: Place) -> str:
        value = self._values[place.number]
        return f"a{value.root} + {value.offset}" if value.offset else f"a{value.root}"

    def _tree(self, tree: Any) -> str:
        kind = type(tree)
        if kind is Place:
            return f"v{tree.number}"
        if kind is dict:
            return "{" + ", ".join(f"{name!r}: {self._tree(one)}" for name, one in tree.items()) + "}"
        if kind is list:
            return "[" + ", ".join(map(self._tree, tree)) + "]"
        if kind is tuple:
            return "(" + "".join(f"{self._tree(one)}, " for one in tree) + ")"
        return repr(tree) if kind in (int, bool, type(None)) else self._constant(tree)

    def _constant(self, one: Any) -> str:
        name = f"c{len(self._names)}"
        self._names[name] = one
        return name


def _parameter(at: object, argument: Any) -> str:
    return f"v{argument.number}" if type(argument) is Place else f"unread{at}"


def _function(lines: list[str], names: dict[str, Any]) -> Callable[..., Any]:
    """The function `run` of these lines, which are made of numbers, brackets and the names given."""
    exec("\n".join(lines), names)
    return cast(Callable[..., Any], names["run"])


def places(tree: Any) -> list[int]:
    """The numbers of all places in a tree."""
    if type(tree) is Place:
        return [tree.number]
    if type(tree) is dict:
        tree = tuple(tree.values())
    return [number for one in tree for number in places(one)] if type(tree) in (tuple, list) else []


def _stream_of_current() -> Any:
    active = triton.runtime.driver.active
    return active.get_current_stream(active.get_current_device())


def _made(step: Step) -> set[int]:
    if isinstance(step, Allocation):
        return {step.number}
    return set(places(step.outputs)) if isinstance(step, Op) else set()


def _read(step: Step, values: list[Value]) -> set[int]:
    if isinstance(step, Op):
        return set(places((step.args, step.kwargs)))
    if isinstance(step, Launch):
        read = set(places(step.arguments))
        return read if INTERPRETED else {values[number].root for number in read}
    return set()


def _needed(
    arguments: int, values: list[Value], steps: list[Step], returned: Any
) -> tuple[list[Step], dict[int, int], set[int]]:
    """Steps without what is made for nobody, after which step each value is let go, and what torch itself reads."""
    by_torch = set(places(returned))
    kept, found = set(by_torch), []
    for step in reversed(steps):
        made, read = _made(step), _read(step, values)
        if isinstance(step, Op) and step.view and made.isdisjoint(by_torch):
            continue
        if isinstance(step, Allocation) and made.isdisjoint(kept):
            continue
        if isinstance(step, Op) or INTERPRETED:
            by_torch |= read
        kept |= read | made
        found.append(step)
    found = found[::-1]
    last: dict[int, int] = {}
    for at, step in enumerate(found):
        last.update(dict.fromkeys(_made(step) | _read(step, values), at))
    out = set(places(returned))
    return found, {one: at for one, at in last.items() if one >= arguments and one not in out}, by_torch


def _pieces(
    values: list[Value], steps: list[Step], last: dict[int, int], by_torch: set[int]
) -> dict[int, tuple[int, int]]:
    """Where temporaries lie in one allocation, (begin, bytes); those in use at the same time do not overlap."""
    found: dict[int, tuple[int, int]] = {}
    for at, step in enumerate(steps):
        if not isinstance(step, Allocation) or step.number in by_torch or step.number not in last:
            continue
        extent = 1 + sum((size - 1) * stride for size, stride in zip(step.shape, step.stride))
        size = -(-extent * step.dtype.itemsize // _ALIGNED) * _ALIGNED if 0 not in step.shape else _ALIGNED
        begin = 0
        for start, length in sorted(place for number, place in found.items() if last[number] >= at):
            if begin + size <= start:
                break
            begin = max(begin, start + length)
        if begin + size <= _TOGETHER:
            found[step.number] = begin, size
    return found if len(found) > 1 else {}
