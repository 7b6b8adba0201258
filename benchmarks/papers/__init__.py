"""The set-ups of the papers' tables: models and data by hub id, merged, scored, and set beside published numbers."""
