"""A tiny ontology: a root, a branch with an alternative id, a part of it, obsolete terms."""

OBO = """format-version: 1.2
data-version: releases/2024-01-01

[Term]
id: GO:0000001
name: root
namespace: biological_process

[Term]
id: GO:0000002
name: branch
namespace: biological_process
alt_id: GO:0000020
is_a: GO:0000001 ! root

[Term]
id: GO:0000003
name: part
namespace: molecular_function
relationship: part_of GO:0000002 ! branch

[Term]
id: GO:0000004
name: obsolete thing
namespace: biological_process
is_obsolete: true

[Term]
id: GO:0000005
name: obsolete branch
namespace: biological_process
is_obsolete: true
replaced_by: GO:0000020

[Term]
id: GO:0000006
name: obsolete and divided
namespace: biological_process
is_obsolete: true
replaced_by: GO:0000002
replaced_by: GO:0000003
"""
