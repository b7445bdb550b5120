"""Scores of cell embeddings beside those of representations that need no training."""
