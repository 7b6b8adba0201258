"""Posteriors over scales and degrees of freedom, with the merged update integrated out."""
