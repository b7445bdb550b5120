"""Which species the gene names of a dataset belong to, so that other species are refused by name.

Ids tell their species themselves (Ensembl ids, FlyBase, WormBase, TAIR and yeast names, genome
prefixes of mixed references). Symbols tell it by the way they are written: mouse and rat write
Gapdh, zebrafish and frog gapdh, human GAPDH. Species that write symbols as human does (most
mammals) are known by the Ensembl ids that stand for their unnamed genes, or not at all.

Ensembl species codes: https://www.ensembl.org/info/genome/stable_ids/prefixes.html
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from data_prep.source import StringArray

_SPECIES = {
    "MUS": "mouse",
    "RNO": "rat",
    "DAR": "zebrafish",
    "MMU": "macaque",
    "MFA": "cynomolgus macaque",
    "PTR": "chimpanzee",
    "GGO": "gorilla",
    "CJA": "marmoset",
    "MIC": "mouse lemur",
    "SSC": "pig",
    "BTA": "cow",
    "OAR": "sheep",
    "ECA": "horse",
    "CAF": "dog",
    "FCA": "cat",
    "MPU": "ferret",
    "OCU": "rabbit",
    "CPO": "guinea pig",
    "GAL": "chicken",
    "XET": "frog",
}
_FOREIGN_ENSEMBL = re.compile(r"(?<![A-Z0-9])ENS([A-Z]{3,4})G\d{11}(?!\d)", re.IGNORECASE)
_BEFORE = r"(?:-\d{4}-[A-Z](?![A-Z0-9])|[.-]p?\d+(?![A-Z0-9]))*(?:[_.:|]+|-+)\S+"
"""Version of a genome, and the name behind it: mm10___Gapdh, GRCm38.p6_Gapdh, mm10---Gapdh."""
_FOREIGN_IDS = {
    "mouse": re.compile(
        rf"MGP_[A-Z0-9]+_G\d{{7}}|(?:mm(?:9|10|39)|GRCm3[89]|mouse|mus_musculus){_BEFORE}", re.I
    ),
    "rat": re.compile(rf"(?:rn[4-7]|Rnor|mRatBN|rattus_norvegicus)[0-9.]*{_BEFORE}", re.I),
    "zebrafish": re.compile(rf"(?:danRer\d+|GRCz1[01]|danio_rerio){_BEFORE}", re.I),
    "fruit fly": re.compile(r"FBgn\d{7}"),
    "Caenorhabditis elegans": re.compile(r"WBGene\d{8}"),
    "Arabidopsis": re.compile(r"AT[1-5MC]G\d{5}"),
    "yeast": re.compile(r"Y[A-P][LR]\d{3}[WC](?:-[A-Z])?"),
}
_MOUSE_HINT = re.compile(r"Gm\d+|[0-9A-Z]+Rik|mt-[A-Z][a-z]\w*")
_RAT_HINT = re.compile(r"RGD\d+|LOC\d+|AABR\d+\.\d+|Mt-[a-z]\w*")
_ZEBRAFISH_HINT = re.compile(r"(?:zgc|wu|im|zmp):\S+|si:\S+")
_FROG_HINT = re.compile(r"[a-z]\w*\.[LS]")
_MOST_FOREIGN = 0.1
"""Spike-ins and a few transgenes are no reason to refuse; the second half of a mixed-species run
is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSpecies:
    """A species that is not human, as told from gene names."""

    name: str
    """Such as mouse; two names where the writing fits both."""
    n_genes: int
    """Names that say so."""
    example: str
    """The first of them."""
    kind: str
    """ids or symbols."""


def find_other_species(names: StringArray, known: Callable[[str], bool]) -> OtherSpecies | None:
    """Return the species other than human that more than a tenth of the names belong to.

    Args:
        names: (n,) gene names of one column.
        known: Says whether a name is a human gene name, as written.

    Returns:
        The species, or None; names that tell nothing (numbers, unknown words) are no species.
    """
    texts = [str(name).strip() for name in names]
    unknown = [text for text in texts if not known(text)]
    ids: dict[str, list[str]] = {}
    for text in unknown:
        species = species_of_id(text)
        if species:
            ids.setdefault(species, []).append(text)
    if sum(map(len, ids.values())) > _MOST_FOREIGN * len(texts):
        name, found = max(ids.items(), key=lambda item: len(item[1]))
        return OtherSpecies(name=name, n_genes=len(found), example=found[0], kind="ids")
    return _by_writing(unknown, len(texts), known)


def species_of_id(text: str) -> str | None:
    """Return the species that an id or a genome before a name tells; None for human and others.

    Args:
        text: Name without blanks around it.
    """
    ensembl = _FOREIGN_ENSEMBL.search(text)
    if ensembl:
        code = ensembl.group(1).upper()
        return _SPECIES.get(code, f"species ENS{code}")
    return next((name for name, form in _FOREIGN_IDS.items() if form.fullmatch(text)), None)


def _by_writing(
    unknown: list[str], n_names: int, known: Callable[[str], bool]
) -> OtherSpecies | None:
    """Name the species whose symbols are human ones but for their case."""
    human_but_for_case = [text for text in unknown if text != text.upper() and known(text.upper())]
    title = [text for text in human_but_for_case if text == text.capitalize()]
    lower = [text for text in human_but_for_case if text == text.lower()]
    written = max(title, lower, key=len)
    if len(written) <= _MOST_FOREIGN * n_names:
        return None
    hints = Counter(
        {
            species: sum(form.fullmatch(text) is not None for text in unknown)
            for species, form in (
                (("mouse", _MOUSE_HINT), ("rat", _RAT_HINT))
                if written is title
                else (("zebrafish", _ZEBRAFISH_HINT), ("frog", _FROG_HINT))
            )
        }
    )
    (first, n_first), (second, n_second) = hints.most_common()
    name = first if n_first > n_second else f"{first} or {second}"
    return OtherSpecies(name=name, n_genes=len(written), example=written[0], kind="symbols")
