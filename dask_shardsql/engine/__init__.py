"""What talks to databases: drivers, pools, and one query on one shard."""
