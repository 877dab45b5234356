"""The Kubeflow components of the pipeline: typed inputs and outputs, image and placement of each component."""
