"""Values in and out: the expression encoder, the vector of a cell, the head."""
