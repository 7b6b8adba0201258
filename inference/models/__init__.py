"""Whole checkpoints: designs, plans, merges, draws, statistics files and ensembles."""
