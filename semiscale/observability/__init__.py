"""Logs, progress, the status objects of a run's tasks, its budget, and Prometheus."""
