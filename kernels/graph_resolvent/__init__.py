"""S = x B^T + A S on graphs with cycles: the state-space fixed point."""
