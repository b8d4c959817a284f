"""States of whole models as values that are made, filled in pieces, chosen from, written into fixed memory and saved.

    state = allocate(model, batch, slots=4096)
    logits, state = prefill(model, ids, state, chunk_size=2048)
    logits, state = model.step(next_ids, state)
    save_state(state, "prompt.safetensors");   state = load_state("prompt.safetensors")

Works on anything with `prefill`, `step` and `init_state`: a mixer, a `Stack`, a `SequenceModel`.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..kernels import TokenTree
from .mixers.common import MixerState
from .mixers.drafts import Draft
from .states import NestedState

_FORMAT = "omnissm-state-1"


def allocate(
    model: nn.Module,
    batch: int,
    *,
    slots: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """State before the first position.

    Args:
        model: With `init_state`.
        batch: Rows.
        slots: Positions that attention layers get room for at once, so that shapes stay fixed; None: they grow.
        device: Where to create it.
        dtype: That of the activations; by default the parameters'.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if slots is not None and "slots" in inspect.signature(model.init_state).parameters:  # type: ignore[arg-type]
        options["slots"] = slots
    return model.init_state(batch, **options)  # type: ignore[operator]


def prefill(
    model: nn.Module, x: Tensor, state: Any = None, *, chunk_size: int | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Any]:
    """`model.prefill` in pieces, so that memory is bounded for any length; the result does not depend on the pieces.

    Args:
        model: With `prefill`.
        x: Input, (b, l, ...).
        state: Of the positions before.
        chunk_size: Positions per piece; None: all at once.
        mask: True at real tokens, (b, l).

    Returns:
        Outputs at all positions, and the state.

    Raises:
        ValueError: if the size is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    outputs = []
    for start in range(0, max(x.shape[1], 1), chunk_size or max(x.shape[1], 1)):
        piece = slice(start, start + (chunk_size or x.shape[1]))
        options = {} if mask is None else {"mask": mask[:, piece]}
        y, state = model.prefill(x[:, piece], state, **options)  # type: ignore[operator]
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def verify(model: nn.Module, x: Tensor, state: Any, tree: TokenTree) -> tuple[Tensor, Draft]:
    """Outputs at all nodes of a tree of continuations in one forward pass, each as after its own path alone.

    Args:
        model: With `verify`: the mixers `mamba2`, `discrete_mamba2` and causal `attention`, and what is made of them.
        x: Input of each node, (b, l) symbols or (b, l, d).
        state: Of the positions before the tree.
        tree: From `omnissm.kernels.token_tree`.

    Returns:
        Outputs (b, l, ...), and a draft for `accept`.

    Raises:
        TypeError: if the model, or one of its layers, takes no trees.
    """
    if not hasattr(model, "verify"):
        raise TypeError(f"{type(model).__name__} takes no trees of positions; decode step by step.")
    return model.verify(x, state, tree)  # type: ignore[operator, no-any-return]


def accept(draft: Draft, node: Tensor | Sequence[int]) -> Any:
    """The state after the path to one node of each row, as if only that path had been taken in.

    Args:
        draft: From `verify`.
        node: The last node of each row's path, (b,) integers; -1 takes none of the tree.

    Raises:
        TypeError: if `node` is not of integers.
        ValueError: if there is no such node.
    """
    return draft.accept(torch.as_tensor(node, device=draft.tree.parent.device))


def copy_state_(target: Any, source: Any) -> None:
    """Write a state's tensors over those of another of the same shapes, for CUDA graphs with fixed memory.

    Raises:
        ValueError: if number, shape or dtype of the tensors differ.
    """
    into, out = list(_named(target)), list(_named(source))
    if [name for name, _ in into] != [name for name, _ in out]:
        raise ValueError("the states are of different models: " + _difference(into, out))
    for (name, kept), (_, new) in zip(into, out):
        if kept.shape != new.shape or kept.dtype != new.dtype:
            raise ValueError(
                f"`{name}` is {tuple(new.shape)} {new.dtype}, expected {tuple(kept.shape)} {kept.dtype}; states that "
                "grow cannot be written over, allocate(..., slots=) makes one that does not."
            )
        if kept is not new:  # steps inside of overwrite_states() have written it already
            kept.copy_(new)


def save_state(state: Any, path: str | os.PathLike[str]) -> None:
    """Write a state to a safetensors file: the tensors, and the types in its header.

    Args:
        state: A `MixerState` or `NestedState`.
        path: File; written whole or not at all.

    Raises:
        TypeError: if it is no state.
    """
    if not isinstance(state, MixerState | NestedState):
        raise TypeError(f"a state of a mixer, stack or model is expected, got {type(state).__name__}.")
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _named(state)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": _FORMAT, "types": json.dumps(_types(state))})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Any:
    """Read what `save_state` wrote, bit for bit.

    Args:
        path: File.
        device: Where to put it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no state, or one of a type that is not of this package.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no state at {path}; save_state(state, path) writes one.")
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} holds no state (format {metadata.get('format')!r}, expected {_FORMAT!r}).")
            return _build(json.loads(metadata["types"]), "", file)
    except (safetensors.SafetensorError, AttributeError, ImportError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is damaged or holds no state: {error!r}.") from error


def _named(part: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors with names such as layers.0.ssm; empty ones too, since they carry a shape."""
    if isinstance(part, Tensor):
        yield prefix, part
    elif isinstance(part, tuple):
        for index, one in enumerate(part):
            yield from _named(one, _join(prefix, index))
    else:
        for field in fields(part):
            yield from _named(getattr(part, field.name), _join(prefix, field.name))


def _join(prefix: str, name: str | int) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def _types(part: Any) -> Any:
    if isinstance(part, Tensor):
        return None
    if isinstance(part, tuple):
        return [_types(one) for one in part]
    # From the package's root on, which may be found under another name elsewhere.
    module = type(part).__module__.partition(".")[2]
    inner = {field.name: _types(getattr(part, field.name)) for field in fields(part)}
    return {"type": f"{module}.{type(part).__qualname__}", "fields": inner}


def _build(types: Any, prefix: str, file: Any) -> Any:
    if types is None:
        return file.get_tensor(prefix)
    if isinstance(types, list):
        return tuple(
            _build(one, f"{prefix}.{index}" if prefix else str(index), file) for index, one in enumerate(types)
        )
    module, _, name = types["type"].rpartition(".")
    root = __name__.partition(".")[0]
    # A file names types and must not be able to load or call anything else.
    kind = getattr(import_module(f"{root}.{module}"), name, None) if module.startswith("ssmcore.") else None
    if not (isinstance(kind, type) and issubclass(kind, MixerState | NestedState)):
        raise ValueError(f"the file names the type {types['type']!r}, which is no state of {root}.ssmcore.")
    inner = types["fields"].items()
    return kind(**{field: _build(one, _join(prefix, field), file) for field, one in inner})


def _difference(first: list[tuple[str, Tensor]], second: list[tuple[str, Tensor]]) -> str:
    apart = {name for name, _ in first} ^ {name for name, _ in second}
    return ", ".join(sorted(apart)[:5])


__all__ = ["accept", "allocate", "copy_state_", "load_state", "prefill", "save_state", "verify"]
