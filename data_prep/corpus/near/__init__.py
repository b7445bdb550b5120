"""Near duplicates: cells whose counts are the same on the genes that two datasets share."""
