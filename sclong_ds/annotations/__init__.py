"""Annotations of cells: one table of columns for a whole corpus."""
