"""Experts that compare predictions: factors over the merged update that see a model's outputs on inputs of a task."""
