"""A checkpoint in, a bundle of fused, verified ONNX graphs out."""
