"""The Kubeflow component of `evaluate`."""
