"""Pages that a person reads after a demo: Markdown beside its pictures, and the same as HTML for a browser."""

from __future__ import annotations

import html
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoints import write_atomic

__all__ = ["PAGE", "SUMMARY", "markdown_table", "render", "run_verb", "whole_page", "write_summary"]

SUMMARY, PAGE = "summary.md", "report.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; border: 1px solid #e4e7eb; padding: 6px; box-sizing: border-box }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid #e4e7eb; padding: .3rem .8rem; text-align: left; vertical-align: top }
pre, code { background: #f5f7fa; font-size: 14px } pre { padding: .6rem; overflow-x: auto }
td p { margin: 0 } h1, h2 { line-height: 1.2; margin-top: 2.5rem } .failed { color: #ba2525 }
"""


def run_verb(*words: object) -> None:
    """Show a command of `omnissm` and run it in this process.

    Args:
        *words: What stands behind `omnissm`, such as "vision", "test".

    Raises:
        SystemExit: with the command's exit code if it is not 0; the command has said why.
    """
    from ...__main__ import main

    texts = [str(word) for word in words]
    sys.stdout.write(f"$ omnissm {shlex.join(texts)}\n")
    sys.stdout.flush()
    code = main(texts)
    if code:
        raise SystemExit(code)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; the first one names the columns."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[name]) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def render(text: str, folder: str = "") -> str:
    """Markdown as HTML, with tables.

    Args:
        text: The Markdown.
        folder: Where pictures and links of the text lie, seen from the page.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for part in [child for token in tokens for child in token.children or ()] if folder else []:
        for name in ("src", "href"):
            target = part.attrGet(name)
            if target and "://" not in str(target):
                part.attrSet(name, f"{folder}/{target}")
    return str(parser.renderer.render(tokens, parser.options, {}))


def whole_page(title: str, body: str) -> str:
    """A page of HTML that needs no other file but its pictures."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def write_summary(out: Path, text: str) -> None:
    """Write `summary.md` and the same as `report.html`, and show the result on standard output.

    Args:
        out: Folder.
        text: Markdown; its first paragraph is "# TITLE", the second the result.
    """
    title, result, *_ = text.split("\n\n")
    write_atomic(out / PAGE, whole_page(title.lstrip("# "), render(text)))
    write_atomic(out / SUMMARY, text)
    sys.stdout.write(f"{' '.join(result.replace('*', '').split())}\nOpen {out / PAGE}\n")
