"""Readers of all file formats: each hands over a `source.Source`."""
