"""The Kubeflow component of `promote`."""
