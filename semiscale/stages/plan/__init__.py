"""Plan: list and check every input, and group the shards of the pool."""
