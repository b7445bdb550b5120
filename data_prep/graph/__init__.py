"""The gene graph from the Gene Ontology, and the initial gene vectors made from it."""
