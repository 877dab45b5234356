"""Promote the student to champion if it is not worse."""
