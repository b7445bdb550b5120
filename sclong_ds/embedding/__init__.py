"""Cells to embeddings, and the model as MLflow serves it."""
