"""Import of the checkpoint published with the scLong paper."""
