"""The contract of `score`."""
