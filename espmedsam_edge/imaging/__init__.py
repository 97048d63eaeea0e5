"""Images in and masks out on the CPU: the reference that the CUDA kernels are tested against."""
