"""From a list of public datasets to whole files on disk and a manifest of them."""
