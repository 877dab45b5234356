"""Promote: make the student the champion if it is not worse."""
