"""The list of datasets and how to read each, from a table, a draft or a command line."""
