"""Evaluate: measure the four models on the test set."""
