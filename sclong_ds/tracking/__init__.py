"""Sends a run to MLflow, survives its outages, and finds runs again."""
