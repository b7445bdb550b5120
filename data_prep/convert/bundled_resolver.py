"""Makes the resolver of the bundled genes when it is imported, once for all workers.

Imported by the process that the workers of `convert` are forked from and by nothing else: they
inherit it, and `gene_names.resolver_of` returns it.
"""

from contextlib import suppress

from data_prep.genes.gene_names import resolver_of
from sclong_ds.corpus.genes import GeneVocabulary

# What is wrong with the tables, a worker meets again and reports.
with suppress(OSError, ValueError):
    # A name that is none makes the tables of repairs, too.
    resolver_of(GeneVocabulary.bundled()).read_name("no gene")
