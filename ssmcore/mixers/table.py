"""All mixers and what they can do, found by building and running each: the table of docs/mixers.md."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ... import kernels
from . import MIXERS, create_mixer
from .graph_ssm import graph_topology

_WIDTH = 768


class MixerRow(NamedTuple):
    """One mixer with its default options.

    Attributes:
        name: Key of `MIXERS`.
        kind: "sequence", "grid" or "graph"; "layer" for one that reads another layer.
        sees: "past", "both sides", or "past or both sides" where an option decides.
        packed: Whether it takes packed sequences (`seq_idx`).
        linear: Whether outputs are linear in an inner signal, so that `mixing_matrix` gives the operator.
        state: Numbers in the state of one sequence at width 768; "none", or "n + m per position" where it grows.
        parameters: At width 768.
        kernels: Operations of `omnissm.kernels` that forward, prefill and step call.
    """

    name: str
    kind: str
    sees: str
    packed: bool
    linear: bool
    state: str
    parameters: int
    kernels: tuple[str, ...]


def mixer_rows() -> list[MixerRow]:
    """A row for every entry of `MIXERS`, in alphabetical order; takes some seconds."""
    with torch.random.fork_rng(devices=[]):
        return [_row(name) for name in sorted(MIXERS)]


def mixer_table(*, markdown: bool = False) -> str:
    """The rows as text in columns, or as a Markdown table."""
    head = ("name", "kind", "sees", "packed", "linear", "state", "parameters", "kernels")
    rows = [
        (
            f"`{row.name}`" if markdown else row.name,
            row.kind,
            row.sees,
            "yes" if row.packed else "no",
            "yes" if row.linear else "no",
            row.state,
            f"{row.parameters:,}",
            ", ".join(f"`{name}`" if markdown else name for name in row.kernels) or "none",
        )
        for row in mixer_rows()
    ]
    if markdown:
        rule = ("---",) * len(head)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)) + "\n"
    widths = [max(len(cells[column]) for cells in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths)) for cells in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def mixers(markdown: bool = False) -> None:
    """List all mixers with what they can do, their state and parameters at width 768, and the kernels they call.

    Args:
        markdown: Print a Markdown table, as in docs/mixers.md.

    Example:
      omnissm mixers
    """
    sys.stdout.write(mixer_table(markdown=markdown))


def _row(name: str) -> MixerRow:
    options = inspect.signature(MIXERS[name]).parameters
    mixer: Any = create_mixer(name, _WIDTH)
    causal = bool(getattr(mixer, "causal", False))
    kind = {"chimera2d": "grid", "graph_ssm": "graph", "gmu": "layer"}.get(name, "sequence")
    sees = "past" if causal else "both sides"
    if "causal" in options or ("bidirectional" in options and kind == "sequence"):
        sees = "past or both sides"
    if kind == "graph":
        sees = "along edges, or both ways"
    return MixerRow(
        name,
        kind,
        sees,
        bool(getattr(mixer, "varlen", False)),
        bool(getattr(mixer, "linear_in_x", hasattr(mixer, "mixing_matrix"))),
        _state(mixer, causal),
        sum(p.numel() for p in mixer.parameters()),
        _kernels(name, kind),
    )


def _state(mixer: Any, causal: bool) -> str:
    """Size of the state; how much it grows by a position where it does."""
    if not causal or not hasattr(mixer, "state_numel"):
        return "none"
    fixed = mixer.state_numel()
    if "l" not in inspect.signature(mixer.state_numel).parameters:
        return f"{fixed:,}" if fixed else "none"
    each = mixer.state_numel(1) - fixed
    return f"{fixed:,} + {each:,} per position" if fixed else f"{each:,} per position"


def _kernels(name: str, kind: str) -> tuple[str, ...]:
    """Operations that a small mixer calls."""
    mixer: Any = create_mixer(name, 64).requires_grad_(False)
    x = torch.zeros(1, 6, 64)
    with _called() as found:
        if kind == "grid":
            mixer(x[:, None])
        elif kind == "graph":
            for edges in ([[0, 1, 2], [1, 2, 3]], [[0, 0, 1, 2], [1, 2, 3, 3]]):  # a chain, and one that is none
                mixer(x[0], graph_topology(torch.tensor(edges), 6))
        elif kind == "layer":
            mixer(x, memory=x)
        else:
            mixer(x)
            if mixer.causal:
                _, state = mixer.prefill(x)
                mixer.step(x[:, 0], state)
    return tuple(sorted(found))


@contextmanager
def _called() -> Iterator[set[str]]:
    """Names of the public operations that are called within; helpers that are no operations left out."""
    public = ((name, getattr(kernels, name)) for name in kernels.__all__)
    folders = {
        each.__code__: name
        for name, each in public
        if isinstance(each, types.FunctionType) and each.__module__.rpartition(".")[2] in ("op", "step", "tree")
    }
    found: set[str] = set()

    def watch(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in folders:
            found.add(folders[frame.f_code])

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield found
    finally:
        sys.setprofile(before)
