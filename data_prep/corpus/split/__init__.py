"""Which cells are held out."""
