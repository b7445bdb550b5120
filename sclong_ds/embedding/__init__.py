"""Cells to embeddings, their evaluation, and the model as MLflow serves it."""
