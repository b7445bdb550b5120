"""The run folder: files, metrics, events, record and identity of a run."""
