"""The Kubeflow components of `pack`."""
