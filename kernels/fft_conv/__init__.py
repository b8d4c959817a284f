"""Long depthwise convolution along time: the kernel of a time-invariant state-space model, applied by FFT."""
