"""Training: from a dataset to a checkpoint whose E-Token means something. The model knows nothing of this package."""
