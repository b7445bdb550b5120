"""Checks of a finished corpus: its files, and drawn cells against their sources."""
