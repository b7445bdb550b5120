"""The list of datasets and how to read each: parsing, drafting, the same options on a command line."""
