"""What a model knows of genes: vectors and networks of them, beside controls."""
