"""Any number of files on the workers of a Ray cluster, of this machine or of many: masks, and a table in Parquet."""
