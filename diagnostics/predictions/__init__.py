"""Predictions of merges and ensembles: calibration, comparison, selective prediction, shift."""
