"""The Kubeflow components of `score`."""
