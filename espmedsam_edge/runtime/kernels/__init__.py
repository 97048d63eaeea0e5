"""The CUDA kernels and how they are called: one operation a ``.cu`` file. See ``docs/kernels.md``."""
