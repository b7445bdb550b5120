"""Checkpoints of a training run: format on disk, saving, loading, conversion."""
