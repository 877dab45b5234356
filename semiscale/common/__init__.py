"""Errors, text, signals, prefetching and worker processes: what every other package uses."""
