"""Several processes that embed the cells of one input."""
