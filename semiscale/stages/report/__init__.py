"""Report the work and the results of a run as one page."""
