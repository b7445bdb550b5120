"""Which species the gene names of a dataset belong to, so that other species are refused by name.

The species of a vocabulary is that of its ids (`species_of`): a list of ENSMUSG ids takes mouse
datasets and refuses human ones.

Ids tell their species themselves (Ensembl ids, FlyBase, WormBase, TAIR and yeast names, genome
prefixes of mixed references). Symbols tell it by the way they are written: mouse and rat write
Gapdh, zebrafish and frog gapdh, human GAPDH. Species that write symbols as human does (most
mammals) are known by the Ensembl ids that stand for their unnamed genes, or not at all.

Ensembl species codes: https://www.ensembl.org/info/genome/stable_ids/prefixes.html
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.source.source import StringArray

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
HUMAN = "human"
_HUMAN_ID = re.compile(
    r"(?<![A-Z0-9])ENSG(?:\d{11}|R\d{10})(?!\d)|^(?:GRCh3[678]|hg1[6-9]|hg38|human)(?=[_.:|-])",
    re.IGNORECASE,
)
_OTHER_NAMES = {
    HUMAN: ("homo sapiens", "9606"),
    "mouse": ("mus musculus", "10090"),
    "rat": ("rattus norvegicus", "10116"),
    "zebrafish": ("danio rerio", "7955"),
    "fruit fly": ("drosophila melanogaster", "7227"),
    "macaque": ("macaca mulatta", "9544"),
    "pig": ("sus scrofa", "9823"),
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
    """A species that is not that of the vocabulary, as told from gene names."""

    name: str
    """Such as mouse; two names where the writing fits both."""
    n_genes: int
    """Names that show it."""
    example: str
    """The first of them."""
    kind: str
    """ids or symbols."""


def species_of(ids: Sequence[str]) -> str:
    """Return the species of a vocabulary: the one that its ids tell, human where none does.

    Args:
        ids: Its gene ids.

    Raises:
        ValueError: The ids are of several species.
    """
    found = Counter(species for gene in ids if (species := _species_or_human(gene)))
    if len(found) > 1:
        (first, n_first), (second, n_second) = found.most_common(2)
        raise ValueError(
            f"the gene list holds {n_first} ids of {first} and {n_second} of {second}; a "
            "vocabulary is of one species"
        )
    return next(iter(found), HUMAN)


def is_species(name: str, species: str) -> bool:
    """Return whether a name of an organism, as manifests write it, is that of a species.

    Args:
        name: Such as human, Homo sapiens, NCBITaxon:9606 or 9606.
        species: As `species_of` returns it.
    """
    plain = name.strip().lower().replace("_", " ").removeprefix("ncbitaxon:")
    return plain in (species.lower(), *_OTHER_NAMES.get(species, ()))


def find_other_species(
    names: StringArray, known: Callable[[str], bool], *, home: str = "human"
) -> OtherSpecies | None:
    """Return the species other than that of the vocabulary that over a tenth of the names are of.

    Args:
        names: (n,) gene names of one column.
        known: Says whether a name is a gene name of the vocabulary's species, as written.
        home: The vocabulary's species.

    Returns:
        The species, or None; names that tell nothing (numbers, unknown words) are no species.
    """
    texts = [str(name).strip() for name in names]
    unknown = [text for text in texts if not known(text)]
    ids: dict[str, list[str]] = {}
    for text in unknown:
        species = species_of_id(text) if home == HUMAN else _species_or_human(text)
        if species and species != home:
            ids.setdefault(species, []).append(text)
    if sum(map(len, ids.values())) > _MOST_FOREIGN * len(texts):
        name, found = max(ids.items(), key=lambda item: len(item[1]))
        return OtherSpecies(name=name, n_genes=len(found), example=found[0], kind="ids")
    if home == HUMAN:
        return _by_writing(unknown, len(texts), known)
    return _written_as_human(unknown, len(texts), known)


def _species_or_human(text: str) -> str | None:
    return HUMAN if _HUMAN_ID.search(text) else species_of_id(text)


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


def _written_as_human(
    unknown: list[str], n_names: int, known: Callable[[str], bool]
) -> OtherSpecies | None:
    """Name human where the symbols differ from those of the vocabulary only in being upper case."""
    upper = [
        text
        for text in unknown
        if text == text.upper() and (known(text.capitalize()) or known(text.lower()))
    ]
    if len(upper) <= _MOST_FOREIGN * n_names:
        return None
    return OtherSpecies(name=HUMAN, n_genes=len(upper), example=upper[0], kind="symbols")


def _by_writing(
    unknown: list[str], n_names: int, known: Callable[[str], bool]
) -> OtherSpecies | None:
    """Name the species whose symbols differ from human ones only in case."""
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
