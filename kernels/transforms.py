"""What custom ops need for torch's transforms: batching rules, and functions that work under `torch.func`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dispatch import BackendError


def fold(tensor: Tensor | None, mapped: int | None, count: int) -> Tensor | None:
    """Merge a mapped dimension into dim 0: (b, ...) mapped `count` times -> (count * b, ...).

    Args:
        tensor: Tensor as the batching rule gets it, None if absent.
        mapped: Position of the mapped dimension, None if the tensor is the same for all.
        count: Size of the mapped dimension.
    """
    if tensor is None:
        return None
    if mapped is None:
        tensor = tensor.expand(count, *tensor.shape)
    else:
        tensor = tensor.movedim(mapped, 0)
    return tensor.flatten(0, 1)


def unfold(tensor: Tensor, count: int) -> Tensor:
    """Undo `fold`: (count * b, ...) -> (count, b, ...)."""
    return tensor.unflatten(0, (count, -1))


def one_by_one(
    function: Callable[..., Any], count: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A batching rule that calls the function for one mapped instance after another, and stacks its outputs.

    Args:
        function: Returns a tuple of tensors.
        count: Size of the mapped dimension.
        in_dims: Position of the mapped dimension of each argument, None if it is the same for all.
        arguments: The arguments as the batching rule gets them.
    """
    each = [
        [argument] * count if mapped is None else argument.unbind(mapped)
        for argument, mapped in zip(arguments, in_dims)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*(function(*one) for one in zip(*each))))
    return outputs, (0,) * len(outputs)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the op `ssm::NAME`, which torch.compile and torch.export keep as it is.

    What `torch.library.custom_op` does, without its checks at every call, which cost more than a small kernel. The
    function is annotated, changes no argument but those that `mutates` names and returns no view of one; fake tensors
    and a batching rule are registered with `torch.library.register_fake` and `register_vmap`.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def unrecorded(*arguments: Any) -> Any:
            # With gradients on, only an exported graph calls the op itself, without the function that has its gradient.
            return _Unrecorded.apply(function, *arguments) if torch.is_grad_enabled() else function(*arguments)

        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(f"ssm::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"ssm::{name}", "default", unrecorded)
        found = getattr(torch.ops.ssm, name).default
        _FUNCTIONS[found] = function
        return found

    return register


# Classes of arguments that say nothing about who sees a call.
_PLAIN_CLASSES = {Tensor, torch.nn.Parameter, type(None), bool, int, float, torch.dtype}

_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


def call(op: Callable[..., Any], *arguments: Any) -> Any:
    """Call an op of `operator`; its function at once where nothing else sees the call, which saves a launch's time."""
    return op(*arguments) if _seen(arguments) else _FUNCTIONS[op](*arguments)


def function_of(op: Callable[..., Any]) -> Callable[..., Any]:
    """What an op of `operator` calls, for launchers whose steps nobody else sees."""
    return _FUNCTIONS[op]


def _seen(arguments: tuple[Any, ...]) -> bool:
    """Whether gradients, a transform or a tracer may want to see a call, or torch has to negate numbers first."""
    if torch.is_grad_enabled() or traced() or transforming():
        return True
    flat = [one for each in arguments for one in (each if type(each) is list else (each,))]
    return not _PLAIN_CLASSES.issuperset(map(type, flat)) or any(
        one.is_neg() for one in flat if isinstance(one, Tensor)
    )


def traced() -> bool:
    """Whether a compiler, a tracer or a mode such as that of fake tensors is at work."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or bool(_modes())


class _Unrecorded(torch.autograd.Function):
    """A call whose inner steps are not recorded; asking for its gradient is an error."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("an exported graph has no gradients of scans; train the module itself and export it after.")


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call an autograd function that has a `setup_context`, in the cheapest way that is right here.

    `torch.func` and torch.compile need the function itself. In eager mode a twin whose forward also sets up the context
    costs half as much to call and to differentiate, and without gradients the forward alone is enough; but not in
    forward mode, whose derivatives are there without them: those that a function lacks must not be taken for zero.
    """
    if torch.compiler.is_compiling():
        # torch.compile cannot trace a function whose context nobody needs.
        needed = torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in arguments)
        return function.apply(*arguments) if needed else function.forward(*arguments)
    if transforming():
        # Without a rule of its own a function works under vmap only by what its forward calls.
        seen = torch.is_grad_enabled() or function.generate_vmap_rule
        return function.apply(*arguments) if seen else function.forward(*arguments)
    return _eager_twin(function).apply(*arguments) if torch.is_grad_enabled() else function.forward(*arguments)


def plain_call(*tensors: Tensor | None) -> bool:
    """Whether a call needs no gradient and `torch.func` is not at work, so that a kernel may write in place."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return False
    return torch.compiler.is_compiling() or not transforming()


def transforming() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work."""
    return _functorch() or getattr(forward_ad, "_current_level", 0) >= 0


# No public function tells whether torch.func is at work; without this one every call takes the general way.
_functorch: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
# Number of modes that see every op, such as fake tensors; one where nobody can tell.
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


@functools.cache
def _eager_twin(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(f"{function.__name__}Eager", (torch.autograd.Function,), members)


class FirstDerivative(torch.autograd.Function):
    """Base of the functions that compute a gradient in Triton and have no gradient of their own.

    Subclasses set `name` and `forward`. A function with a setup context of its own, unlike an autograd formula that is
    registered with a custom op, also works under `torch.func.grad`.
    """

    generate_vmap_rule = True
    name = "this op"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @classmethod
    def backward(cls, ctx: Any, *gradients: Tensor) -> Any:
        raise BackendError(f"{cls.name} has no second derivative in Triton; call it with backend='chunked'.")
