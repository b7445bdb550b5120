"""Data preparation: raw single-cell datasets in, one shuffled and checksummed corpus out. CPU only.

Run as `python -m data_prep COMMAND` (convert, status, finalize, verify, gene-graph, gene-vectors);
see `__main__.py`. Every module does one step: `manifest` lists the datasets, `readers` opens a file
of any supported format, `counts` proves that its values are raw counts, `harmonize` maps its genes
onto the vocabulary, `convert` stages one dataset after the other, `finalize` builds the corpus from
the staged ones and `verify` reads it all again. Of `sclong_ds` only `genes` and `store` are used.
"""
