"""Short depthwise convolution along time, with a state."""
