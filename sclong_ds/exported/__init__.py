"""Exported models: the model folder, export from checkpoints, initial weights from a folder."""
