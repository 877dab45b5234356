"""The contract of `promote`."""
