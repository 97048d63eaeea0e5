"""The demonstration: pictures and a clip, segmented with the weights that come along, on one sheet."""
