"""Shards and their readers, labels, decoding and transforms of images and videos."""
