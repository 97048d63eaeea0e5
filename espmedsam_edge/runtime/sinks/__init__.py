"""Where results go: one module a kind of sink, and the places they may be written to."""
