"""State-space scan over the nodes of directed acyclic graphs."""
