"""What "auto" takes of the graphs and backends there are, and the trials that it goes by."""
