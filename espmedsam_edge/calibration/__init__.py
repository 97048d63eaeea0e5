"""Lower precision with a guarantee: calibration images, FP16, INT8, the accuracy gate."""
