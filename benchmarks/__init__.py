"""Suites on real checkpoints and data; run from the checkout, not installed."""
