"""Class probabilities scored: calibration, selective prediction, shift, and methods compared on the same examples.

Every number is an :class:`~diagnostics.estimates.Estimate` with a bootstrap interval over examples, by an explicit
seed. ``evaluate`` runs models on tasks and scores them; ``evaluate_predictions`` is about a file of predictions
(``load_predictions``) of several methods on several tasks.
"""
