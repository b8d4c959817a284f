"""Which implementation of an op runs, and why.

Order of preference: the `backend` argument, `with use_backend(...)`, the environment variable SSM_BACKEND, and then an
automatic choice (Triton for CUDA tensors where the op supports the call, else chunked). A backend that was asked for by
name is used or refused with a reason; only the automatic choice falls back.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "chunked", "triton"]
"""Implementation of an op: `"auto"` takes the fastest that the inputs allow, the others are taken or refused."""
BACKENDS: tuple[str, ...] = get_args(Backend)
IMPLEMENTATIONS: tuple[str, ...] = BACKENDS[1:]

# A plain module variable and not a ContextVar: torch.compile guards on it, so compiled code follows `use_backend`.
_requested: str = "auto"


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run this call; the message says why and what to use instead."""


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Use one backend for every op called in this block, in all threads, unless a call names its own.

    Args:
        backend: "reference", "chunked", "triton", or "auto" for the automatic choice.

    Raises:
        ValueError: if the name is unknown.
    """
    global _requested
    _check_name(backend, "use_backend")
    before, _requested = _requested, backend
    try:
        yield
    finally:
        _requested = before


def available_backends(device: str | torch.device = "cpu") -> dict[str, str | None]:
    """What can run on tensors of a device here.

    Args:
        device: Device or device type, such as "cpu" or "cuda".

    Returns:
        For every implementation the reason why it is unavailable, or None where it is available.
    """
    return {name: triton_obstacle(torch.device(device).type) if name == "triton" else None for name in IMPLEMENTATIONS}


def choose(
    backend: Backend,
    tensor: Tensor,
    *,
    op: str,
    obstacle: str | None = None,
    implementations: tuple[str, ...] = IMPLEMENTATIONS,
    fusible: bool = False,
) -> str:
    """Choose the implementation for one call of an op.

    Args:
        backend: The op's `backend` argument.
        tensor: A tensor of the call; its device decides.
        op: Name of the op, for messages.
        obstacle: Why Triton cannot take this call, None if it can.
        implementations: What the op offers.
        fusible: Whether torch.compile makes the chunked path as fast as Triton; the automatic choice is then chunked
            in compiled code.

    Returns:
        A member of `implementations`.

    Raises:
        ValueError: if the backend's name is unknown.
        BackendError: if a backend asked for by name cannot run this call.
    """
    source = ""
    _check_name(backend, op)
    if backend == "auto" and _requested != "auto":
        backend, source = _requested, " (from use_backend)"  # type: ignore[assignment]
    if backend == "auto":
        backend = _environment_backend()  # type: ignore[assignment]
        source = " (from SSM_BACKEND)"
        _check_name(backend, "SSM_BACKEND")
    if backend == "auto":
        if fusible and torch.compiler.is_compiling():
            return "chunked"
        return _automatic(tensor, obstacle, implementations)
    if backend not in implementations:
        reason: str | None = f"{op} has no {backend} implementation"
    elif backend == "triton":
        reason = obstacle or triton_obstacle(tensor.device.type)
    else:
        reason = None
    if reason is not None:
        raise BackendError(
            f"backend='{backend}'{source} is not possible here: {reason}. Use backend='auto' or 'chunked'."
        )
    return backend


def autocast_enabled(kind: str) -> bool:
    """Whether autocast is on for a type of device; tensors without data have none.

    Args:
        kind: As `torch.device.type` gives it.
    """
    return kind != "meta" and torch.is_autocast_enabled(kind)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the tensors in its dtype (float64 ones stay as they are); else unchanged."""
    kind = tensors[0].device.type
    if not autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def _automatic(tensor: Tensor, obstacle: str | None, implementations: tuple[str, ...]) -> str:
    if "triton" in implementations and obstacle is None and tensor.device.type == "cuda":
        problem = triton_obstacle("cuda")
        if problem is None:
            return "triton"
        _warn_once(problem)
    return "chunked" if "chunked" in implementations else implementations[0]


def _check_name(backend: str, where: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}.")


def _environment_backend() -> str:
    return os.environ.get("SSM_BACKEND", "") or "auto"


def triton_obstacle(device_type: str) -> str | None:
    """Why Triton cannot run on tensors of this device type in this process, or None if it can."""
    return _triton_obstacle(device_type)


@functools.cache
def _triton_obstacle(device_type: str) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install triton, Linux only)"
    if device_type == "cpu":
        # Looked up first without importing Triton: where it is not asked for, it should cost nothing.
        if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
            import triton.language as tl

            # Triton's own library functions are decorated when Triton is first imported.
            if type(tl.cdiv).__name__ == "InterpretedFunction":
                return None
            return "TRITON_INTERPRET was set after Triton had been imported; set it before Python starts"
        return "Triton needs a CUDA tensor, got device 'cpu' (or set TRITON_INTERPRET=1 to debug on CPU)"
    if device_type != "cuda":
        return f"Triton needs a CUDA tensor, got device '{device_type}'"
    try:
        import triton

        triton.runtime.driver.active.get_current_target()
        capability = torch.cuda.get_device_capability()
    except Exception as error:  # whatever keeps a driver or a compiler from starting
        return f"Triton does not start ({type(error).__name__}: {error})"
    if torch.version.hip is None and capability < (8, 0):
        return f"Triton kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


# torch.compile takes what these return as constants. This is the mark that torch.compiler.assume_constant_result sets;
# calling that function would import torch._dynamo and Triton, more than a second.
for _function in (_environment_backend, triton_obstacle):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined, union-attr]


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"CUDA tensors run on the slower chunked path: {problem}.", RuntimeWarning, stacklevel=5)
