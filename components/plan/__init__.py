"""The contract of `plan`."""
