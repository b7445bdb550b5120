"""Gene names of any kind to columns of the vocabulary."""
