"""Proof that a matrix holds raw counts, and their restoration from log1p values."""
