"""Dynamic chunking: a learned router cuts a sequence into chunks, an inner network works on one vector per chunk.

Hwang, Wang & Gu (2025), "Dynamic Chunking for End-to-End Hierarchical Sequence Modeling".
"""

from ..mixers.common import padding_behind as padding_behind
from .boundaries import Boundaries as Boundaries
from .boundaries import Chunks as Chunks
from .boundaries import Layout as Layout
from .boundaries import chunk as chunk
from .boundaries import chunk_stats as chunk_stats
from .boundaries import dechunk as dechunk
from .boundaries import ratio_loss as ratio_loss
from .boundaries import straight_through as straight_through
from .hierarchy import Hierarchy as Hierarchy
from .hierarchy import HierarchyState as HierarchyState
from .hierarchy import Stage as Stage
from .hierarchy import stage_multipliers as stage_multipliers
from .routers import FixedRouter as FixedRouter
from .routers import RandomRouter as RandomRouter
from .routers import Router as Router
from .routers import RouterState as RouterState

__all__ = [
    "Boundaries",
    "Chunks",
    "FixedRouter",
    "Hierarchy",
    "HierarchyState",
    "Layout",
    "RandomRouter",
    "Router",
    "RouterState",
    "Stage",
    "chunk",
    "chunk_stats",
    "dechunk",
    "padding_behind",
    "ratio_loss",
    "stage_multipliers",
    "straight_through",
]
