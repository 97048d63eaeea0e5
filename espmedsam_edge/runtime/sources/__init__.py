"""Where frames come from: one module a kind of source, one place that opens them."""
