"""Evidence of designs in Full coordinates: the merged update integrated out exactly given a weight per expert."""
