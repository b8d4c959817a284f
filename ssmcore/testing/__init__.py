"""The contracts of mixers as checks that any implementation can be put through, ours or a user's.

    for check in SEQUENCE_CHECKS:
        check(mixer)

Each takes a mixer whose width is `mixer.d_model`, in any floating dtype and on any device, and raises AssertionError
with the reason. float64 mixers are checked the most strictly.
"""

from .grid import GRID_CHECKS as GRID_CHECKS
from .grid import check_causal as check_causal
from .grid import check_gradients as check_gradients
from .grid import check_mask as check_mask
from .grid import grid_input as grid_input
from .sequence import SEQUENCE_CHECKS as SEQUENCE_CHECKS
from .sequence import check_compile as check_compile
from .sequence import check_export as check_export
from .sequence import sequence_input as sequence_input

__all__ = [
    "GRID_CHECKS",
    "SEQUENCE_CHECKS",
    "check_causal",
    "check_compile",
    "check_export",
    "check_gradients",
    "check_mask",
    "grid_input",
    "sequence_input",
]
