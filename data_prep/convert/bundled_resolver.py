"""Makes the resolver of the bundled genes when it is imported, once for all workers.

Imported by the process that the workers of `convert` are forked from and by nothing else: they
inherit it, and `gene_names.resolver_of` returns it.
"""

from data_prep.genes.gene_names import resolver_of
from sclong_ds.corpus.genes import GeneVocabulary

# A name that none is makes the tables of repairs, too.
resolver_of(GeneVocabulary.bundled()).read_name("no gene")
