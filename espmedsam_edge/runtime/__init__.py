"""What runs on the device: backends, segmenter, sources, sinks, pipeline, bench. Never imports torch."""
