"""Repeat what a launcher did without its Python: its allocations, its kernels, and torch's ops between them.

A launcher, the function of an op that calls Triton kernels, decides by shapes, strides, dtypes and options alone what
it allocates and launches. Deciding takes the host longer than small kernels run. The second call of a kind is therefore
recorded, and later ones do again what was recorded, with other tensors. Nothing is kept of the tensors themselves.

Imported by `triton_impl` modules only, so that Triton stays optional.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .autotune import autotuning
from .replay_source import Allocation, Launch, Op, Place, Source, Step, Value, places
from .triton_utils import INTERPRETED, direct, quick, recording

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

# Kinds of calls that are remembered, and steps of all that is recorded; a step takes about a kilobyte.
_MOST, _MOST_STEPS = 4096, 50_000
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_known: dict[tuple[Any, ...], Source | bool] = {}
_in_interpreter = False


def replayed(launcher: Launcher) -> Launcher:
    """Decorator of a launcher: from the third call of a kind on, what the second one did is done again.

    A kind is the shapes, strides, dtypes and alignments of all tensors, all other arguments, the device, torch's
    settings of float32 products and autocast, and whether a CUDA graph is being recorded. A launcher must depend on
    nothing else: it reads no value of a tensor on the GPU, launches `quick` kernels alone, and takes its arguments by
    position. Calls with tensors elsewhere, with one tensor twice or while a profiler sees every launch are not
    replayed, and nothing is recorded while tiles are searched.
    """

    @functools.wraps(launcher)
    def call(*arguments: Any) -> Any:
        kind, tensors = _kind(launcher, arguments)
        if kind is None:
            return launcher(*arguments)
        found = _known.get(kind)
        if type(found) is Source:
            return found.run(*arguments)
        if found is None:
            if len(_known) >= _MOST:
                _known.clear()
            _known[kind] = True
        if not found or autotuning():
            return launcher(*arguments)
        recorder = _Recorder(tensors)
        outputs = recorder.run(launcher, arguments)
        replay = recorder.replay(arguments, outputs)
        steps = sum(len(one.lines) for one in (replay, *_known.values()) if type(one) is Source)
        if steps > _MOST_STEPS:
            _known.clear()
        _known[kind] = replay or False
        return outputs

    return cast(Launcher, call)


def forget() -> None:
    """Forget all that was recorded; needed where something changes that launchers take as given, such as tiles."""
    _known.clear()


@contextmanager
def in_interpreter() -> Any:
    """Replay in Triton's interpreter, too, where it saves nothing; launchers must read no value of any tensor."""
    global _in_interpreter
    before, _in_interpreter = _in_interpreter, True
    try:
        yield
    finally:
        _in_interpreter = before


def _kind(launcher: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...] | None, list[Tensor]]:
    """The kind of a call, None where it is not replayed, and its tensors."""
    key: list[Any] = [launcher]
    flat: list[Any] = []
    for argument in arguments:
        if type(argument) is list:
            key.append(len(argument))
            flat += argument
        else:
            flat.append(argument)
    tensors: list[Tensor] = []
    for one in flat:
        kind = type(one)
        if kind is Tensor or kind is torch.nn.Parameter:
            if one.is_neg():  # its numbers are those in memory times -1
                return None, tensors
            tensors.append(one)
            key += one.shape, one.stride(), one.dtype, one.data_ptr() & 15
        elif isinstance(one, Tensor):
            return None, tensors
        else:
            key += kind, one
    if not tensors or len(set(map(id, tensors))) < len(tensors) or recording.by is not None:
        return None, tensors
    device = tensors[0].device.type
    key += torch.get_float32_matmul_precision(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    if INTERPRETED:
        return (tuple(key) if _in_interpreter else None), tensors
    # Triton launches on the current GPU.
    current = torch.cuda.current_device() if device == "cuda" else -1
    for one in tensors:
        if one.get_device() != current:
            return None, tensors
    if not direct():
        return None, tensors
    key += current, torch.cuda.is_current_stream_capturing()
    return tuple(key), tensors


class _Recorder(TorchDispatchMode):
    """Takes down what a launcher does.

    Args:
        tensors: The tensors among its arguments.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.device = tensors[0].device
        self.values: list[Value] = []
        # Tensors are not kept, since those of all groups of rows, say, need not fit the memory at once. The id of one
        # that is gone may be that of another one.
        self.places: dict[int, int] = {}
        self.watched: dict[int, weakref.ref[Tensor]] = {}
        for one in tensors:
            self._add(one, None)
        self.steps: list[Step] = []
        self.possible = True
        self.launching = False

    def run(self, launcher: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        recording.by = self
        try:
            with self:
                return launcher(*arguments)
        finally:
            recording.by = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.launching:
            return func(*args, **kwargs)
        recording.by = None  # an op with kernels of its own is one step
        try:
            found = func(*args, **kwargs)
        finally:
            recording.by = self
        given = self._placed((args, kwargs))
        if not isinstance(found, (Tensor, tuple, list, type(None))) and not places(given):
            return found  # of two dtypes, say
        several = isinstance(found, (tuple, list))
        made = [] if found is None else list(found) if several else [found]
        new = [one for one in made if isinstance(one, Tensor) and id(one) not in self.places]
        roots = [self._root(one, given) for one in new]
        indices = [self._add(one, root) for one, root in zip(new, roots)]
        if any(not isinstance(one, Tensor) or one.device != self.device for one in made):
            self.possible = False  # a value was read
        elif func in _ALLOCATIONS:
            self.steps.append(Allocation(indices[0], found.shape, found.stride(), found.dtype, found.device))
        else:
            view = bool(roots) and all(root is not None for root in roots)
            outputs = [Place(self.places[id(one)]) for one in made]
            self.steps.append(Op(func, given[0], given[1], several, outputs, view))
        return found

    def launch(self, kernel: quick, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Launch a kernel and take that down.

        Args:
            kernel: What to launch.
            grid: Programs.
            arguments: Those given by position.
            options: Those given by name.
        """
        self.launching = True  # what Triton itself asks of torch is not the launcher's
        try:
            compiled = kernel.kernel[grid](*arguments, **options)
        finally:
            self.launching = False
        given = self._placed(arguments)
        self.possible &= not any(isinstance(one, Tensor) for one in options.values())
        if not INTERPRETED:
            named = kernel.arg_names[len(arguments) :]
            self.possible &= all(name in options for name in named)  # none has a default
            given = (*given, *(options.get(name) for name in named))
        self.steps.append(Launch(kernel, compiled, grid, given, options))
        return compiled

    def replay(self, arguments: tuple[Any, ...], outputs: Any) -> Source | None:
        """What was taken down, None where it cannot be done again."""
        given, returned = self._placed(arguments), self._placed(outputs)
        return Source(given, self.values, self.steps, returned) if self.possible else None

    def _placed(self, tree: Any) -> Any:
        """The tree with places instead of tensors."""
        if isinstance(tree, Tensor):
            if id(tree) not in self.places:
                self.possible = False  # it comes from elsewhere
                return None
            return Place(self.places[id(tree)])
        kind = type(tree)
        if kind is tuple or kind is list:
            return kind([self._placed(one) for one in tree])
        if kind is dict:
            return {name: self._placed(one) for name, one in tree.items()}
        if isinstance(tree, (tuple, list, dict)) and kind is not torch.Size:
            self.possible = False  # a class of its own, which may hold tensors
        return tree

    def _root(self, tensor: Tensor, given: Any) -> tuple[int, int] | None:
        """The root of a view and the bytes between them; None for a tensor with its own memory."""
        storage = tensor.untyped_storage().data_ptr()
        for index in places(given):
            of = self.values[index]
            if storage and of.storage == storage:
                return of.root, tensor.data_ptr() - self.values[of.root].address
        return None

    def _add(self, tensor: Tensor, root: tuple[int, int] | None) -> int:
        index, name = len(self.values), id(tensor)
        self.places[name] = index
        self.watched[name] = weakref.ref(tensor, lambda _: self.places.pop(name, None))
        self.values.append(Value(tensor.data_ptr(), tensor.untyped_storage().data_ptr(), *(root or (index, 0))))
        return index
