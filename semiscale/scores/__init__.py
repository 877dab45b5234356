"""Score files in rank bands, and where the scored samples lie."""
