"""Whole slides: read region by region, segmented where there is tissue, resumed where they were left."""
