"""The single objects of a mask: touching ones taken apart, measured, and followed over time."""
