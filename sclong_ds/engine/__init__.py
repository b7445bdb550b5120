"""The DeepSpeed engine, its configuration, and the ranks that run it."""
