"""One dataset into its staging folder: read, prove, filter, write, read back."""
