"""Scan operators of state-space models, as functions on tensors."""

if __name__ == "kernels":
    # Python was started inside the checkout, and this folder hides the distribution of the same name that other
    # libraries import. Stand in for that one if it is installed; else stay empty.
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None and _spec.origin is not None:
        __spec__, __file__ = _spec, _spec.origin
        __path__ = _spec.submodule_search_locations or []
        _spec.loader.exec_module(sys.modules["kernels"])
else:
    from .causal_conv1d.op import causal_conv1d as causal_conv1d
    from .causal_conv1d.step import conv_step as conv_step
    from .causal_conv1d.step import conv_step_ as conv_step_
    from .causal_conv1d.tree import conv_tree as conv_tree
    from .causal_conv1d.tree import conv_tree_state as conv_tree_state
    from .cross_scan.op import cross_scan as cross_scan
    from .dag_scan.op import dag_scan as dag_scan
    from .dag_scan.order import DagOrder as DagOrder
    from .dag_scan.order import chain_order as chain_order
    from .dag_scan.order import dag_order as dag_order
    from .dispatch import Backend as Backend
    from .dispatch import BackendError as BackendError
    from .dispatch import autocast_enabled as autocast_enabled
    from .dispatch import available_backends as available_backends
    from .dispatch import use_backend as use_backend
    from .ema_scan.op import ema_scan as ema_scan
    from .fft_conv.op import fft_conv as fft_conv
    from .gated_norm.layer import add_rounded_layer_norm as add_rounded_layer_norm
    from .gated_norm.layer import rounded_layer_norm as rounded_layer_norm
    from .gated_norm.op import gated_norm as gated_norm
    from .gated_norm.rms import rms_norm as rms_norm
    from .gating import swiglu as swiglu
    from .graph_resolvent.edges import GraphEdges as GraphEdges
    from .graph_resolvent.edges import graph_edges as graph_edges
    from .graph_resolvent.iterative import ConvergenceError as ConvergenceError
    from .graph_resolvent.op import choose_method as choose_method
    from .graph_resolvent.op import graph_resolvent as graph_resolvent
    from .linear_scan.op import linear_scan as linear_scan
    from .overwriting import overwrite_states as overwrite_states
    from .packing import cu_seqlens_to_seq_idx as cu_seqlens_to_seq_idx
    from .quasiseparable.blocks import HydraWeights as HydraWeights
    from .quasiseparable.blocks import hydra_blocks as hydra_blocks
    from .quasiseparable.from_steps import quasiseparable_from_steps as quasiseparable_from_steps
    from .quasiseparable.op import quasiseparable as quasiseparable
    from .quasiseparable.rows import hydra_rows as hydra_rows
    from .rotate import rotate_heads as rotate_heads
    from .scan2d.grid import grid_scan as grid_scan
    from .scan2d.op import scan2d as scan2d
    from .scan2d.op import selective_scan2d as selective_scan2d
    from .scan2d.step import scan2d_step as scan2d_step
    from .scan2d.step import scan2d_step_ as scan2d_step_
    from .selective_scan.op import selective_scan as selective_scan
    from .selective_scan.step import selective_step as selective_step
    from .selective_scan.step import selective_step_ as selective_step_
    from .selective_scan.vim_rows import VimWeights as VimWeights
    from .selective_scan.vim_rows import vim_rows as vim_rows
    from .ssd.op import ssd as ssd
    from .ssd.rates import ssd_rates as ssd_rates
    from .ssd.step import ssd_step as ssd_step
    from .ssd.step import ssd_step_ as ssd_step_
    from .ssd.tree import ssd_tree as ssd_tree
    from .ssd.tree import ssd_tree_state as ssd_tree_state
    from .token_tree import TokenTree as TokenTree
    from .token_tree import token_tree as token_tree
    from .trapezoid_ssd.op import trapezoid_ssd as trapezoid_ssd
    from .trapezoid_ssd.state import TrapezoidState as TrapezoidState
    from .trapezoid_ssd.step import trapezoid_step as trapezoid_step
    from .trapezoid_ssd.step import trapezoid_step_ as trapezoid_step_

    __all__ = [
        "Backend",
        "BackendError",
        "ConvergenceError",
        "DagOrder",
        "GraphEdges",
        "HydraWeights",
        "TokenTree",
        "TrapezoidState",
        "VimWeights",
        "add_rounded_layer_norm",
        "autocast_enabled",
        "available_backends",
        "causal_conv1d",
        "chain_order",
        "choose_method",
        "conv_step",
        "conv_step_",
        "conv_tree",
        "conv_tree_state",
        "cross_scan",
        "cu_seqlens_to_seq_idx",
        "dag_order",
        "dag_scan",
        "ema_scan",
        "fft_conv",
        "gated_norm",
        "graph_edges",
        "graph_resolvent",
        "grid_scan",
        "hydra_blocks",
        "hydra_rows",
        "linear_scan",
        "overwrite_states",
        "quasiseparable",
        "quasiseparable_from_steps",
        "rms_norm",
        "rotate_heads",
        "rounded_layer_norm",
        "scan2d",
        "scan2d_step",
        "scan2d_step_",
        "selective_scan",
        "selective_scan2d",
        "selective_step",
        "selective_step_",
        "ssd",
        "ssd_rates",
        "ssd_step",
        "ssd_step_",
        "ssd_tree",
        "ssd_tree_state",
        "swiglu",
        "token_tree",
        "trapezoid_ssd",
        "trapezoid_step",
        "trapezoid_step_",
        "use_backend",
        "vim_rows",
    ]
