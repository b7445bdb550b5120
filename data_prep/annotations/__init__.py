"""Annotations of the cells of all datasets, put together for the corpus."""
