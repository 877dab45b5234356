"""The Kubeflow component of `plan`."""
