"""Provide logs, progress, status objects, the budget, and Prometheus metrics."""
