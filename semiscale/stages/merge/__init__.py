"""Merge: select the exact top K images of every class over the whole pool."""
