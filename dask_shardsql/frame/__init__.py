"""The dask DataFrame over shards."""
