"""omnissm: state-space models for images, genomes, time series and graphs.

Subpackages are imported on first use, so that ``import omnissm`` and the command line start at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import genomics, graphs, kernels, ssmcore, timeseries, vision

    __version__: str

__all__ = ["genomics", "graphs", "kernels", "ssmcore", "timeseries", "vision"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("omnissm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
