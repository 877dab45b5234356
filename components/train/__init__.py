"""The Kubeflow component of `train`."""
