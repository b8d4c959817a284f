"""Comparing an implementation of an op with its reference; used by tests and benchmarks, and open to users' own ops.

The reference runs in float64 on exactly the numbers the implementation got. The error of a tensor is the root mean
square of the difference over the root mean square of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 2e-2,
}


@dataclass(frozen=True)
class BenchSize:
    """A size that is timed on a GPU, with the milliseconds (forward, forward and backward) to reach and to aim for.

    `required_mib` is the most memory that forward and backward may take beyond the inputs, in MiB.
    """

    size: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    required_ms: tuple[float, float] | None = None
    stretch_ms: tuple[float, float] | None = None
    required_mib: float | None = None


@dataclass(frozen=True)
class OpSpec:
    """All that tests, benchmarks and documentation need to know of an op.

    Attributes:
        op: The public function; takes `backend=`.
        make_inputs: `make_inputs(**size, dtype=, device=, generator=)` -> keyword arguments of the op. Floating and
            complex tensors among them get gradients, everything else (flags, indices) is passed on.
        outputs: Names of the op's outputs, in order.
        test_sizes: Sizes for the tests; the entries are keyword arguments of `make_inputs`.
        bench_sizes: Sizes for the GPU benchmark.
        cpu_bench_sizes: Sizes for the CPU benchmark.
        implementations: What the op offers.
        not_triton: Entries of a size that the Triton implementation does not take, where they are set.
        twice_differentiable: Whether the chunked path has second derivatives.
        free: Tensors whose last size no other tensor shares, so that none can disagree with it.
        tolerance: Looser limits than `TOLERANCE` by (tensor name, dtype); state the reason beside the entry.
    """

    op: Callable[..., Any]
    make_inputs: Callable[..., dict[str, Any]]
    outputs: tuple[str, ...]
    test_sizes: tuple[Mapping[str, Any], ...]
    bench_sizes: tuple[BenchSize, ...] = ()
    cpu_bench_sizes: tuple[BenchSize, ...] = ()
    implementations: tuple[str, ...] = ("reference", "chunked", "triton")
    not_triton: tuple[str, ...] = ()
    twice_differentiable: bool = True
    free: tuple[str, ...] = ()
    tolerance: Mapping[tuple[str, torch.dtype], float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.op.__name__

    def offers(self, backend: str, size: Mapping[str, Any] | None = None) -> bool:
        """Whether the op has an implementation, and this one takes inputs of a size."""
        excluded = backend == "triton" and any((size or {}).get(name) for name in self.not_triton)
        return backend in self.implementations and not excluded

    def limit(self, tensor: str, dtype: torch.dtype) -> float:
        """Largest allowed relative error of a tensor ("y", "dx", ...) for inputs of a dtype."""
        return self.tolerance.get((tensor, dtype), TOLERANCE[dtype])


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference; 0 if both are empty, inf if not finite.

    Where the reference is exactly zero everywhere the absolute root mean square is returned.

    Raises:
        ValueError: if the shapes differ.
    """
    if value.shape != reference.shape:
        raise ValueError(f"Shapes differ: got {tuple(value.shape)}, reference {tuple(reference.shape)}.")
    if value.numel() == 0:
        return 0.0
    wide = torch.complex128 if reference.is_complex() else torch.float64
    value, reference = value.detach().to(wide), reference.detach().to(wide)
    difference = (value - reference).abs().square().mean().sqrt().item()
    scale = reference.abs().square().mean().sqrt().item()
    if difference != difference:
        return float("inf")
    return difference / scale if scale > 0 else difference


def run_with_gradients(
    op: Callable[..., Any], inputs: Mapping[str, Any], outputs: tuple[str, ...], cotangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Call an op and return its outputs and, as `dNAME`, the gradients of its differentiable inputs.

    Args:
        op: The function.
        inputs: Its keyword arguments.
        outputs: Names for its outputs, in order.
        cotangents: Gradient that enters at each output, by name; outputs that are missing here, or
            that depend on no differentiable input, get none.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items() if _differentiable(value)}
    result = op(**{**inputs, **leaves})
    named = dict(zip(outputs, result if isinstance(result, tuple) else (result,), strict=True))
    used = [name for name in named if name in cotangents and named[name].requires_grad]
    gradients = torch.autograd.grad(
        [named[name] for name in used],
        list(leaves.values()),
        [cotangents[name].to(named[name].dtype) for name in used],
        allow_unused=True,
    )
    found = {
        f"d{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return {name: value.detach() for name, value in named.items()} | found


def check_op(
    spec: OpSpec,
    size: Mapping[str, Any],
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    seed: int = 0,
    **options: Any,
) -> dict[str, float]:
    """Compare one backend with the float64 reference: every output and every gradient.

    Args:
        spec: The op.
        size: One of `spec.test_sizes`, or any keyword arguments of `spec.make_inputs`.
        backend: Implementation to check.
        dtype: dtype of the inputs.
        device: Device of the inputs.
        seed: Seed of the inputs and of the gradients that enter at the outputs.
        **options: Further keyword arguments of the op, for both sides.

    Returns:
        The relative error of each output and gradient.

    Raises:
        AssertionError: if an error is above its limit, a shape differs or a value is not finite.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    inputs = spec.make_inputs(**size, dtype=dtype, device=device, generator=generator) | options
    wide_inputs = {name: _widen(value) for name, value in inputs.items()}
    with torch.no_grad():
        shapes = spec.op(**inputs, backend=backend)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    cotangents = {
        name: torch.randn(value.shape, dtype=value.dtype, device=device, generator=generator)
        for name, value in zip(spec.outputs, shapes, strict=True)
        if _differentiable(value)
    }
    # Gradients enter with the numbers that the narrow dtype can hold, for both sides alike.
    expected = run_with_gradients(
        lambda **arguments: spec.op(**arguments, backend="reference"), wide_inputs, spec.outputs, cotangents
    )
    got = run_with_gradients(
        lambda **arguments: spec.op(**arguments, backend=backend), inputs, spec.outputs, cotangents
    )
    errors = {}
    for name, value in got.items():
        errors[name] = relative_error(value, expected[name])
        limit = spec.limit(name, dtype)
        if not errors[name] <= limit:
            raise AssertionError(
                f"{spec.name}: `{name}` of backend {backend!r} is off by {errors[name]:.2e}, allowed {limit:.0e} "
                f"(size {dict(size)}, {dtype}, {device})."
            )
    return errors


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _widen(value: Any) -> Any:
    if not _differentiable(value):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)
