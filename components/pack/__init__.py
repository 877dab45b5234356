"""The contract of `pack`."""
