"""RMS norm with a SiLU gate."""
