"""The corpus on disk: format, reading and writing; no torch."""
