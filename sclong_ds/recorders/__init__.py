"""Trackers beside MLflow, fed from the files of the run folder."""
