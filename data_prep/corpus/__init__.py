"""From staged datasets to a finished corpus: duplicates, splits, order, statistics."""
