"""The Kubeflow component of `merge`."""
