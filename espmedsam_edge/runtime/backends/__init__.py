"""What runs a graph: one module a backend behind one protocol, and the frame's path on a GPU."""
