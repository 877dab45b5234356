"""Architectures, networks, weights, checkpoints, execution mode and export."""
