"""Inference over a labeled split, metrics, and the cache of predictions."""
