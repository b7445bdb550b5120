"""Datasets that come to a finished corpus: a part of their own, and the list of parts."""
