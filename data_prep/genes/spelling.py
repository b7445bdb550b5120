"""How one gene name is written: repairs that are mechanical, and names that Excel made dates of.

A repair undoes what a program did to a name: a genome put before it, id and symbol joined, hyphens
turned into dots by R, a number put behind a repeated name. It is made only where the name means no
gene as it stands, of any gene that is known, listed or not, and where what comes out does mean one.
Which repairs were made is counted (REPAIRS), so that a dataset that needed them can be told.

Dates (MARCHF1 was once written MARCH1, and 1-Mar by Excel) are recognised and never guessed:
1-Mar may have been MARCH1 or MARC1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property, lru_cache

from data_prep.genes.species import HUMAN, species_of_id

ID_TYPES = ("auto", "ensembl", "symbol")
"""What a manifest can say that a gene column holds."""
REPAIRS = ("signs", "genome", "case", "joined", "characters", "suffix", "beside")
"""signs: quotes, byte order marks, dashes that are no hyphens; genome: GRCh38_ or the like before
the name; case: ensg00000141510, C1ORF56; joined: id and symbol in one; characters: HLA.A for HLA-A
(R), Y-RNA for Y_RNA (Seurat), X7SK for 7SK (R); suffix: TBCE.1 of a list that has TBCE too; beside:
the id is of no known gene, and the gene was taken from another column or part of the name."""

_GENOME = re.compile(
    r"^(?:GRCh3[678]|NCBI3[56]|hg1[6-9]|hg38|human|homo_sapiens|GRCm3[89]|mm9|mm10|mm39|mouse"
    r"|mus_musculus|rn[4-7]|Rnor_6|mRatBN7|rattus_norvegicus|danRer\d+|GRCz1[01]|danio_rerio)"
    r"(?:-\d{4}-[A-Z](?![A-Z0-9])|[.-]p?\d+(?![A-Z0-9]))*(?:_premrna)?(?:[_.:|]+|-+)",
    re.IGNORECASE,
)
_ID = r"ENS(?:[A-Z]{3,4})?G(?:\d{11}|R\d{10})"
_TAIL = r"(?:[._-]\d{1,3})*(?:[._-]PAR[._-]Y)?(?:[._-]\d{1,3})*"
_WHOLE_ID = re.compile(rf"({_ID}){_TAIL}", re.IGNORECASE)
_SEPARATOR = r"[\s_|:;,/.(\[-]+"
_ID_FIRST = re.compile(rf"({_ID})(?:\.\d+)?(?:_PAR_Y)?{_SEPARATOR}(.+?)[)\]]?", re.IGNORECASE)
_ID_LAST = re.compile(rf"(.+?){_SEPARATOR}({_ID})(?:\.\d+)?(?:_PAR_Y)?[)\]]?", re.IGNORECASE)
_READING_FRAME = re.compile(r"(C(?:\d{1,2}|X|Y))ORF(\d+)(?![a-z])")
_SUFFIX = re.compile(r"(.+?)[._-]\d{1,3}")
_NO_R_NAME = re.compile(r"[^A-Za-z0-9._]")
# Hyphens, dashes and minus signs to hyphens; byte order marks, soft hyphens, zero width to nothing.
_SIGNS = dict.fromkeys((*range(0x2010, 0x2015), 0x2212), "-") | dict.fromkeys(
    (0xFEFF, 0xAD, 0x2060, *range(0x200B, 0x200E)), None
)
_QUOTES = "\"'`\u2018\u2019\u201c\u201d"
_MISSING = re.compile(r"(?:nan|none|null|n/?a|<na>|\d*(?:\.\d*)?)", re.IGNORECASE)
"""What stands for no name; NaN and 14.1 are aliases of genes, and never meant."""
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?|mrz|mär|mai|okt|dez)\.?"
)
_DATE = re.compile(
    rf"(?:\d{{1,4}}[-./\s]{_MONTH}(?:[-./\s]\d{{2,4}})?|{_MONTH}[-./\s]\d{{1,4}}"
    r"|(?:19|20)\d\d([-./])\d\d?\1\d\d?(?:[T\s]00:00(?::00)?(?:\.0+)?)?"
    r"|\d\d?([-./])\d\d?\2(?:19|20)?\d\d)",
    re.IGNORECASE,
)
_DAY = re.compile(r"X?[34]\d{4}(?:\.0)?")
"""Days since 1900: 30000 is 1982, 49999 is 2036."""


class Speller:
    """Reads names by what is known of them.

    Args:
        known: What each known name means: a text that is equal for names of one gene. None of the
            names `is_missing`.
        species: Of the known names; names of others are left as they are.
    """

    def __init__(self, known: Mapping[str, str], *, species: str = HUMAN) -> None:
        self._known, self._species = known, species
        self._read: dict[object, tuple[str, tuple[str, ...]]] = {}

    def read(self, name: object) -> tuple[str, tuple[str, ...]]:
        """Return a name as the known ones are written, and the REPAIRS that took.

        Args:
            name: As in the file.

        Returns:
            A known name, or the bare name where none is meant.
        """
        found = self._read.get(name)
        if found is None:
            if len(self._read) > 2**18:
                self._read.clear()
            found = self._read[name] = self._understand(str(name))
        return found

    def _understand(self, text: str) -> tuple[str, tuple[str, ...]]:
        stripped = text.strip()
        if stripped in self._known:
            return stripped, ()
        if species_of_id(stripped) not in (None, self._species):
            return stripped, ()
        tidy = stripped.translate(_SIGNS).strip(_QUOTES + " \t\u00a0")
        bare = bare_name(tidy)
        made = ("signs",) * (tidy != stripped) + ("genome",) * (bare != tidy)
        for one in (tidy, bare):
            if one in self._known:
                return one, made if one == bare else made[:1]
        gene = ensembl_id(bare)
        if gene is not None:
            numbers = re.fullmatch(r"[^._-]+(?:\.\d+)?(?:_PAR_Y)?", bare, re.IGNORECASE) is None
            return gene, made + ("case",) * (bare[:3] != "ENS") + ("suffix",) * numbers
        name, more = self._joined(bare) or self._written(bare) or (bare, ())
        return name, made + more

    def _joined(self, text: str) -> tuple[str, tuple[str, ...]] | None:
        """Take an id and a symbol apart; the id counts where it is of a known gene."""
        first, last = _ID_FIRST.fullmatch(text), _ID_LAST.fullmatch(text)
        if first is not None:
            gene, beside = ensembl_id(first.group(1)), first.group(2)
        elif last is not None:
            beside, gene = last.group(1), ensembl_id(last.group(2))
        else:
            return None
        assert gene is not None
        if re.search(_ID, beside, re.IGNORECASE):
            # Reads that two genes share.
            return (gene, ("joined",)) if ensembl_id(beside) == gene else None
        if gene in self._known:
            return gene, ("joined",)
        name, _ = self.read(beside)
        return (name, ("joined", "beside")) if name in self._known else (gene, ("joined",))

    def _written(self, text: str) -> tuple[str, tuple[str, ...]] | None:
        """Undo upper case of reading frames, and characters that R or Seurat replaced."""
        frame = _READING_FRAME.sub(r"\1orf\2", text)
        if frame != text and frame in self._known:
            return frame, ("case",)
        name = self._replaced.get(text)
        return None if name is None else (name, ("characters",))

    @cached_property
    def _replaced(self) -> dict[str, str]:
        """Names as R's make.names and Seurat change them -> the only name that becomes so."""
        found: dict[str, str] = {}
        several: set[str] = set()
        for name, gene in self._known.items():
            if name.isalnum() and name[0].isalpha():
                continue
            dotted = _NO_R_NAME.sub(".", name)
            in_r = dotted if name[0].isalpha() or name[0] == "." else f"X{dotted}"
            for form in {in_r, dotted, name.replace("_", "-").replace("|", "-")}:
                if self._known[found.setdefault(form, name)] != gene:
                    several.add(form)
        return {
            form: name
            for form, name in found.items()
            if form not in self._known and form not in several
        }


def ensembl_id(text: str) -> str | None:
    """Return an Ensembl gene id without version and PAR mark, or None for another name.

    Args:
        text: Name without blanks around it, such as ensg00000141510.18 or ENSGR0000124334.
    """
    found = _WHOLE_ID.fullmatch(text)
    return None if found is None else found.group(1).upper().replace("ENSGR", "ENSG0")


def bare_name(name: object) -> str:
    """Return a gene name without blanks around it and the genome before it.

    Args:
        name: As in the file.
    """
    return _GENOME.sub("", str(name).strip())


def is_missing(text: str) -> bool:
    """Return whether a name stands for no name, or is a number.

    Args:
        text: Such as nan, NA or 14.1.
    """
    return _MISSING.fullmatch(text) is not None


def without_suffix(text: str) -> str | None:
    """Return a name without the number that makes repeated names unique; None where it has none.

    Args:
        text: Such as TBCE.1, TBCE-1 or TBCE_1.
    """
    found = _SUFFIX.fullmatch(text)
    return None if found is None else found.group(1)


@lru_cache(maxsize=2**18)
def is_excel_date(text: str) -> bool:
    """Return whether a name is a date, as Excel writes MARCH1, SEPT2 or DEC1.

    Args:
        text: Name that means no gene; also as R writes it (X1.Mar).
    """
    return _DATE.fullmatch(re.sub(r"^X(?=\d)", "", text.strip(_QUOTES))) is not None


def is_day_number(text: str) -> bool:
    """Return whether a name is the number that Excel keeps for a day.

    Args:
        text: Name that means no gene, such as 44256 (2021-03-01).
    """
    return _DAY.fullmatch(text) is not None
