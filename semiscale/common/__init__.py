"""Provide errors, text, signals, prefetching and worker processes to all packages."""
