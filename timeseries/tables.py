"""Tables for the terminal and for files."""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from ..ssmcore.training.checkpoints import write_atomic

__all__ = ["print_facts", "print_table", "to_markdown", "write_table"]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def print_table(frame: pd.DataFrame, title: str = "") -> None:
    """A frame on standard output, numbers to four digits."""
    if title:
        sys.stdout.write(f"{title}\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, kind in frame.dtypes.items():
        table.add_column(str(column), justify="right" if pd.api.types.is_numeric_dtype(kind) else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*map(_text, row))
    # a pipe has no width of its own, and cutting columns off would lose data
    console = Console(file=sys.stdout)
    Console(file=sys.stdout, width=None if console.is_terminal else 200).print(table)


def print_facts(facts: dict[str, Any], title: str) -> None:
    """Names and values on standard output, one a line."""
    width = max(map(len, facts))
    lines = [title, *(f"  {name:<{width}}  {_text(value)}" for name, value in facts.items()), ""]
    sys.stdout.write("\n".join(lines) + "\n")


def to_markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table."""
    head = [str(column) for column in frame]
    rule = ["---:" if pd.api.types.is_numeric_dtype(kind) else "---" for kind in frame.dtypes]
    rows = [[_text(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)) + "\n"


def write_table(frame: pd.DataFrame, path: str) -> None:
    """Write a frame as .csv or .md, whole or not at all."""
    write_atomic(path, to_markdown(frame) if path.endswith(".md") else frame.to_csv(index=False))
