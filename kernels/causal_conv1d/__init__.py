"""Short depthwise convolution along time, with a state."""

from .op import causal_conv1d as causal_conv1d
