"""The contract of `merge`."""
