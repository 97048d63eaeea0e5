"""Video files and codecs: containers, reading, writing, PyAV and GStreamer."""
