"""The contract of `evaluate`."""
