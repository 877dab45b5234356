"""The contract of `train`."""
