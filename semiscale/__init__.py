"""Billion-scale semi-supervised learning for image classification, as a Kubeflow pipeline."""
