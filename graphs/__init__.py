"""State-space models on graphs, with and without cycles: batches, models, baselines, and a layer for PyG users."""

from .batch import Graph as Graph
from .batch import GraphBatch as GraphBatch
from .batch import collate as collate
from .conv import ChimeraConv as ChimeraConv
from .encoders import depth_pe as depth_pe
from .encoders import random_walk_pe as random_walk_pe
from .encoders import sibling_pe as sibling_pe
from .models import create_model as create_model
from .models import list_models as list_models
from .order import orient as orient
from .order import rank_nodes as rank_nodes
from .prepare import prepare as prepare
from .pyg import from_pyg as from_pyg
from .pyg import to_pyg as to_pyg

__all__ = [
    "ChimeraConv",
    "Graph",
    "GraphBatch",
    "collate",
    "create_model",
    "depth_pe",
    "from_pyg",
    "list_models",
    "orient",
    "prepare",
    "random_walk_pe",
    "rank_nodes",
    "sibling_pe",
    "to_pyg",
]
