"""The Kubeflow component of `report`."""
