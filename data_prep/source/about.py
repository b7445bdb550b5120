"""What the file of a dataset states of where it comes from.

AnnData files of CELLxGENE hold `title`, `citation` and `schema_version` in uns; the citation names
publication and version: "Publication: https://doi.org/10.1/2 Dataset Version: https://.../ID.h5ad
curated and distributed by CZ CELLxGENE Discover in Collection: https://...".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

NAMES = ("title", "citation", "doi", "licence", "license", "schema_version")
"""Texts of uns that are read."""
CELLXGENE_LICENCE = "CC BY 4.0"
"""Of all data of CELLxGENE Discover."""
MOST_LETTERS = 2000
_DOI = re.compile(r"(?i)publication:\s*(?:https?://(?:dx\.)?doi\.org/)?(10\.\d{4,9}/\S+)")
_VERSION = re.compile(r"(?i)dataset version:\s*\S*/([^/\s]+?)(?:\.h5ad|\.rds)?(?=\s|$)")


def about(texts: Mapping[str, str]) -> dict[str, str]:
    """Return title, doi, version, licence, citation and schema_version, those that are known.

    Args:
        texts: Those of NAMES that the file has.
    """
    found = {n: " ".join(t.split())[:MOST_LETTERS] for n, t in texts.items()}
    citation = found.get("citation", "")
    facts = {
        "title": found.get("title", ""),
        "doi": found.get("doi") or _first(_DOI, citation),
        "version": _first(_VERSION, citation),
        "licence": found.get("licence") or found.get("license", ""),
        "citation": citation,
        "schema_version": found.get("schema_version", ""),
    }
    if not facts["licence"] and "CELLxGENE Discover" in citation:
        facts["licence"] = CELLXGENE_LICENCE
    return {name: text for name, text in facts.items() if text}


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""
