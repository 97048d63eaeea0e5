"""DICOM: reading, display, decoders in a process of their own, segmentation objects."""
