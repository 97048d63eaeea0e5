"""A dataset folder in, a table and pictures out, for a checkpoint or for a bundle on any backend."""
