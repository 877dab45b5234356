"""Report: what a run did, and its results, as one page."""
