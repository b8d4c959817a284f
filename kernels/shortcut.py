"""Calls of an op that are like earlier ones go straight to what those led to.

An op checks its arguments, chooses a backend, converts dtypes and calls one autograd function. All that depends on
shapes, strides, dtypes, options and settings alone and takes the host longer than small kernels run. The second call of
a kind is therefore watched. Where it came to one autograd function of a Triton implementation, with arguments and
outputs passed on as they are, later calls go there at once, and its forward and backward are replayed as a whole.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from . import dispatch
from .transforms import planned_apply, traced, transforming, watching

P = ParamSpec("P")
R = TypeVar("R")

_MOST = 4096  # kinds that are remembered
_PLAIN = {type(None), bool, int, float, str}
_TENSORS = {Tensor, torch.nn.Parameter}
_plans: dict[tuple[Any, ...], _Plan | bool] = {}
_in_interpreter = False


def shortcut(op: Callable[P, R]) -> Callable[P, R]:
    """Decorator of an op: from the third call of a kind on, its autograd function is called at once.

    A kind is the shapes, strides, dtypes, devices and alignments of all tensors and which need gradients, all other
    arguments, and the settings of backends, gradients, autocast and float32 products. Only calls with tensors on the
    current GPU have one: on a CPU ops look at values, too.
    """

    @functools.wraps(op)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return op(*arguments, **options)
        kind, tensors = _kind(op, arguments, options)
        if kind is None:
            return op(*arguments, **options)
        plan = _plans.get(kind)
        if type(plan) is _Plan:
            return cast(R, plan(tensors))
        if plan is None:
            if len(_plans) >= _MOST:
                _plans.clear()
            _plans[kind] = True
        if not plan:
            return op(*arguments, **options)
        applied: list[tuple[Any, tuple[Any, ...], Any]] = []
        watching.applied = applied
        try:
            found = op(*arguments, **options)
        finally:
            watching.applied = None
        _plans[kind] = _planned(kind, tensors, applied, found) or False
        return found

    return call


def forget() -> None:
    """Forget what calls led to; needed where something changes that launchers take as given, such as tiles."""
    _plans.clear()


def in_interpreter(on: bool) -> None:
    """Whether calls with tensors on a CPU are watched, too."""
    global _in_interpreter
    _in_interpreter = on


def _kind(
    op: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...] | None, list[Tensor]]:
    """The kind of a call, None where it takes the long way, and its tensors."""
    tensors: list[Tensor] = []
    key: list[Any] = [op, *options]
    try:
        for one in (*arguments, *options.values()):
            kind = type(one)
            if kind in _TENSORS:
                if not (one.is_cuda or _in_interpreter) or one.is_neg():
                    return None, tensors
                tensors.append(one)
                layout = one.is_contiguous() or one.stride()
                key += one.shape, layout, one.dtype, one.data_ptr() & 15, one.requires_grad
            elif kind in _PLAIN:
                key += kind, one
            elif kind is tuple and all(type(part) is str for part in one):
                key.append(one)
            else:
                return None, tensors
    except RuntimeError:  # no strided tensor with an address
        return None, tensors
    settings = _settings(tensors)
    if settings is None or watching.applied is not None or len(set(map(id, tensors))) < len(tensors):
        return None, tensors
    for one in tensors:  # Triton launches on the current GPU
        if one.get_device() != settings[0]:
            return None, tensors
    backend = dispatch.requested()
    if backend == "auto" and options.get("backend", backend) == "auto":
        backend = os.environ.get("SSM_BACKEND", "")
    key += backend, torch.is_grad_enabled(), *settings
    return tuple(key), tensors


def _settings(tensors: list[Tensor]) -> tuple[Any, ...] | None:
    """What launchers read beside their arguments; None where something else sees the call."""
    if not tensors or transforming() or traced() or watching.by is not None:
        return None
    device, current, capturing = "cpu", -1, False
    if tensors[0].is_cuda:
        from .triton_utils import direct

        if not direct():
            return None
        device, current, capturing = "cuda", torch.cuda.current_device(), torch.cuda.is_current_stream_capturing()
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return current, capturing, autocast, torch.get_float32_matmul_precision()


class _Plan:
    """Where calls of a kind go.

    Args:
        kind: Its key.
        function: The autograd function.
        arguments: Tree of its arguments, with places for the tensors of the call.
        returned: Tree of what the op returns, with places for the function's outputs.
    """

    def __init__(
        self, kind: tuple[Any, ...], function: type[torch.autograd.Function], arguments: Any, returned: Any
    ) -> None:
        from .replay_source import filler

        self._kind, self._function = kind, function
        self._arguments, self._returned = filler(arguments), filler(returned)
        self._apply = planned_apply(function) if torch.is_grad_enabled() else None
        self.forward: Callable[..., Any] = self._record_forward
        self._backwards: dict[tuple[Any, ...], Callable[..., Any] | bool | None] = {}

    def __call__(self, tensors: list[Tensor]) -> Any:
        arguments = self._arguments(tensors)
        found = self.forward(*arguments) if self._apply is None else self._apply(self, *arguments)
        return self._returned(found if type(found) is tuple else (found,))

    def _record_forward(self, *arguments: Any) -> Any:
        from .replay import record

        found, run = record(self._function.forward, arguments)
        if run is None:
            _plans[self._kind] = False
        self.forward = run or self._function.forward
        return found

    def backward(self, ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments.

        Args:
            ctx: Context of the autograd function.
            gradients: Those of its outputs.
        """
        saved = ctx.saved_tensors
        key: list[Any] = []
        tensors: list[Tensor] = []
        plain = not torch.is_grad_enabled() and _plans.get(self._kind) is self
        for one in (*saved, *gradients):
            if one is None:
                key.append(None)
            elif plain and type(one) in _TENSORS and not one.is_neg():
                tensors.append(one)
                key += one.is_contiguous() or one.stride(), one.dtype, one.data_ptr() & 15
            else:
                plain = False
        settings = _settings(tensors) if plain else None
        # What is saved may come back as a copy, and then with other strides or digits, but not with another shape.
        run: Callable[..., Any] | bool | None = False
        kind = *key, *(settings or ())
        if settings is not None and len(set(map(id, tensors))) == len(tensors):
            run = self._backwards.setdefault(kind, None)
        if callable(run):
            return cast(tuple[Tensor | None, ...], run(*saved, *gradients))

        def backward(*given: Any) -> Any:
            return tuple(self._function.backward(_Context(ctx, given[: len(saved)]), *given[len(saved) :]))

        if run is None:
            from .replay import record

            found, run = record(backward, (*saved, *gradients))
            self._backwards[kind] = run or False
            return cast(tuple[Tensor | None, ...], found)
        return cast(tuple[Tensor | None, ...], backward(*saved, *gradients))


class _Context(SimpleNamespace):
    """What a backward reads of its context."""

    def __init__(self, ctx: Any, saved: tuple[Any, ...]) -> None:
        super().__init__(**vars(ctx))
        self.saved_tensors = saved


def _planned(
    kind: tuple[Any, ...], tensors: list[Tensor], applied: list[tuple[Any, tuple[Any, ...], Any]], found: Any
) -> _Plan | None:
    """Where a call went that applied these functions and returned this; None if not straight to one."""
    if len(applied) != 1:
        return None
    ((function, arguments, outputs),) = applied
    outputs = outputs if type(outputs) is tuple else (outputs,)
    from .replay_source import placed

    given, returned = placed(arguments, tensors), placed(found, list(outputs))
    return None if given is None or returned is None else _Plan(kind, function, given, returned)
