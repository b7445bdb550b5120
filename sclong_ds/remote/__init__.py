"""Remote files read in parts: limits, second requests, and what a machine keeps of them."""
