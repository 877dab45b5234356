"""Evaluate the four models on the test set."""
