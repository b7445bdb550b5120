"""The data loader: order of cells, sampling weights, reading, decoding; no torch."""
