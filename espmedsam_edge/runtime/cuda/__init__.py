"""The CUDA driver behind Python objects: device, memory, streams, modules, NVRTC."""
