"""One file to fetch: its address, what is known of it, and its line in a manifest."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_prep.ledger.ledger import is_safe_id
from data_prep.manifest.address import check_address, public_and_full, without_secrets
from data_prep.manifest.manifest import ORIGIN

ENDING = re.compile(r"(?i)\.(h5ad|h5mu|h5|hdf5|loom|zarr\.zip|csv|tsv|txt)(\.gz)?$")
"""Formats of one file; those of several files (mtx, npz) cannot be named by one address."""
_MANIFEST = (
    *("dataset_id", "path", "organism", "tissue", "donor_column", "assay_column"),
    *("cell_type_column", "n_cells", *ORIGIN),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A file to fetch; what the list does not say of it is empty or None."""

    dataset_id: str
    url: str
    """Its address as it may be recorded (`manifest.address`)."""
    address: str = field(default="", repr=False, compare=False)
    """What is asked for: `url`, or with a signature that is never recorded."""
    size: int | None = None
    """Bytes."""
    sha256: str = ""
    """Hex; of the bytes that came when the file was first fetched."""
    version: str = ""
    title: str = ""
    doi: str = ""
    citation: str = ""
    licence: str = ""
    collection: str = ""
    """Its id."""
    n_cells: int | None = None
    n_primary: int | None = None
    """Cells that no other dataset of the source holds as its own."""
    terms: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    """Label and ontology id of organism, tissue, assay, disease and suspension_type; a name is
    absent where the list has no such field."""
    schema: str = ""
    """`cellxgene` where the cell annotations have the names of its schema."""

    def __post_init__(self) -> None:
        """Keep what may not be recorded out of `url`."""
        url, address = public_and_full(self.url, self.address)
        object.__setattr__(self, "url", url)
        object.__setattr__(self, "address", address)

    @property
    def file_name(self) -> str:
        """Name of the file on disk: that of the dataset with the ending of the address."""
        ending = ENDING.search(unquote(urlsplit(self.url).path))
        return self.dataset_id + (ending.group().lower() if ending else ".h5ad")


def items_of(lines: Sequence[str], *, where: str) -> list[Item]:
    """Return the files of a list of addresses.

    Args:
        lines: An address each, or a dataset id, a tab and an address; empty lines and those that
            begin with `#` are skipped.
        where: The list, for messages.

    Raises:
        ValueError: A line is something else, or an id is given twice; all are named.
    """
    pairs: dict[tuple[str, str], str] = {}
    given, problems = [], []
    for number, line in enumerate(lines, 1):
        name, _, url = line.strip().rpartition("\t")
        name, url = name.strip(), url.strip()
        if not url or url.startswith("#") or name.startswith("#"):
            continue
        try:
            check_address(url)
            if name and not is_safe_id(name):
                raise ValueError(f"dataset id '{name[:100]}' cannot be a file name")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
        given += [name] if name else []
        # One file that is signed twice is one file; the later signature is valid for longer.
        public = without_secrets(url)
        pairs[name or _id_of_address(public), public] = url
    count = Counter(name.lower() for name, _ in pairs)
    repeated = Counter(name.lower() for name in given)
    problems += [
        f"dataset id '{name}' twice"
        for name in given
        if max(count[name.lower()], repeated[name.lower()]) > 1
    ]
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems[:10])}")
    return [
        Item(
            dataset_id=name if count[name.lower()] == 1 else f"{name}-{_short(public)}",
            url=url,
        )
        for (name, public), url in pairs.items()
    ]


def _id_of_address(url: str) -> str:
    base = unquote(urlsplit(url).path).rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", ENDING.sub("", base)).lstrip("_.-")
    return name[:100] or f"dataset-{_short(url)}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def manifest_text(
    places: Sequence[tuple[Item, str]], *, missing: Sequence[tuple[Item, str]] = ()
) -> str:
    """Return a manifest that `convert` takes.

    Args:
        places: Files with their paths, or with their addresses where `convert` is to fetch them.
        missing: Files that are not there, with the reason; they become comment lines.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, _MANIFEST, delimiter="\t", lineterminator="\n")
    table.writeheader()
    for item, path in places:
        cells = {
            "dataset_id": item.dataset_id,
            "path": path,
            "tissue": ", ".join(labels(item, "tissue")),
            "n_cells": item.n_cells,
            **{name: getattr(item, "size" if name == "bytes" else name) for name in ORIGIN},
        }
        organisms = labels(item, "organism")
        if len(organisms) == 1:
            cells["organism"] = organisms[0]
        if item.schema == "cellxgene":
            cells |= {"donor_column": "donor_id", "assay_column": "assay"}
            cells["cell_type_column"] = "cell_type"
        table.writerow({k: " ".join(str(v).split()) for k, v in cells.items() if v is not None})
    for item, reason in missing:
        text.write(f"# not fetched: {item.dataset_id}: {' '.join(reason.split())}\n")
    return text.getvalue()


def labels(item: Item, name: str) -> list[str]:
    """Return the labels that an item has under one of its terms.

    Args:
        item: The item.
        name: See `Item.terms`.
    """
    return [label for label, _ in item.terms.get(name, ())]


def path_in(folder: Path, item: Item) -> Path:
    """Return where an item lies once it is fetched.

    Args:
        folder: The folder of the files.
        item: The item.
    """
    return folder / item.file_name
