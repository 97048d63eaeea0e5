"""TensorRT engines: built in a process of their own, kept in a cache, tried, compared, run."""
