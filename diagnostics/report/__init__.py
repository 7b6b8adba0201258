"""The HTML report of a merge."""
