"""h_t = a_t h_{t-1} + b_t."""

from .op import linear_scan as linear_scan
