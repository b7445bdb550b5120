"""What every reader hands over: cells in rows, in bounded blocks, and which features are genes."""
