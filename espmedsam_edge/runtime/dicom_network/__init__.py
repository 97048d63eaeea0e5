"""The DICOM network: takes pictures that others send, has them segmented, and sends the segmentations on."""
