"""Data modules of this domain; importing this package loads Lightning."""

from .base import GraphData as GraphData
from .packed import read_packed as read_packed
from .packed import write_packed as write_packed
from .processed import read_processed as read_processed
from .sets import LRGB as LRGB
from .sets import ZINC as ZINC
from .sets import Cora as Cora
from .sets import Packed as Packed
from .sets import ProcessedSet as ProcessedSet
from .sets import SyntheticGraphs as SyntheticGraphs
from .synthetic import create_graphs as create_graphs

__all__ = [
    "LRGB",
    "ZINC",
    "Cora",
    "GraphData",
    "Packed",
    "ProcessedSet",
    "SyntheticGraphs",
    "create_graphs",
    "read_packed",
    "read_processed",
    "write_packed",
]
