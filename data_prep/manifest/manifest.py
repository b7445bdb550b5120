"""The list of datasets to convert: a tab-separated table or a YAML list.

Only `dataset_id` and `path` are required. Cells of the table may be quoted as in csv. All problems
of a table are reported together, by line.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.counts.option import COUNTS_HELP, parse_counts
from data_prep.genes.species import is_species
from data_prep.genes.spelling import ID_TYPES
from data_prep.ledger.ledger import is_safe_id
from data_prep.manifest.address import check_address, public_and_full
from data_prep.manifest.where import WHERE_HELP, parse_where
from data_prep.source.source import FORMATS
from sclong_ds.files.atomic import read_file

ORIGIN: Mapping[str, str] = {
    "url": "address that the file was fetched from; kept with the dataset",
    "version": "of the dataset, as its publisher names it; kept with the dataset",
    "bytes": "size of the file at a URL; another one there is refused",
    "sha256": "of the file at a URL, hex; another one there is refused",
    "title": "of the dataset; kept with it",
    "doi": "of its publication; kept with it",
    "licence": "of the data, such as CC BY 4.0; kept with it",
    "citation": "how to cite the dataset; kept with it",
}
"""Columns that tell where the data come from."""
COLUMNS: Mapping[str, str] = {
    "dataset_id": "name of the dataset: letters, digits, '_', '-' and '.', unique in any case "
    "of its letters (required)",
    "path": "file or folder, relative to the folder of the manifest, or the address of a file "
    "(http, https, s3, gs, ftp, file), which is fetched and removed again (required)",
    "format": f"auto (default) or one of {', '.join(FORMATS)}",
    "organism": "auto (default): that of the gene list; another one is excluded",
    "tissue": "free text, kept with the dataset",
    "obs_columns": "cell annotations to keep, comma-separated; * all, none: none; empty: the usual",
    "donor_column": "cell annotation that names the donor; kept as 'donor' (used by the split)",
    "sample_column": "cell annotation that names the sample; kept as 'sample'",
    "assay_column": "cell annotation that names the assay; kept as 'assay'",
    "cell_type_column": "cell annotation that names the cell type; kept as 'cell_type'",
    "counts": f"matrix with the raw counts: {COUNTS_HELP}",
    "gene_column": "column that names the genes: auto (default), index or the name of one",
    "id_type": f"what that column holds: {', '.join(ID_TYPES)} (default auto: any mixture)",
    "gene_list": "file that names the genes of an npz file, one a line (default: beside it)",
    "genome": "genome to keep of a 10x file with several: auto (default) or its name",
    "min_genes": "drop cells with fewer genes of the vocabulary (default: that of --min-genes)",
    "min_counts": "drop cells with fewer counts on them (default: that of --min-counts)",
    "where": WHERE_HELP,
    "n_cells": "number of cells, for the reader; ignored",
    **ORIGIN,
    "note": "free text, ignored",
}
REQUIRED = ("dataset_id", "path")
OBS_ROLES = ("donor", "sample", "assay", "cell_type")
_NUMBERS = ("min_genes", "min_counts")
_NO_OPTIONS = ("dataset_id", "path", "gene_list", "n_cells", "note", *ORIGIN)
"""Columns that do not enter the settings hash; of the files it is the content that counts."""
_MOST_PROBLEMS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One line of a manifest; the fields are those of COLUMNS."""

    dataset_id: str
    path: Path
    format: str = "auto"
    organism: str = "auto"
    tissue: str = ""
    obs_columns: str = ""
    donor_column: str = ""
    sample_column: str = ""
    assay_column: str = ""
    cell_type_column: str = ""
    counts: str = "auto"
    gene_column: str = "auto"
    id_type: str = "auto"
    gene_list: Path | None = None
    genome: str = "auto"
    min_genes: int | None = None
    min_counts: int | None = None
    where: str = ""
    n_cells: str = ""
    url: str = ""
    version: str = ""
    bytes: int | None = None
    sha256: str = ""
    title: str = ""
    doi: str = ""
    licence: str = ""
    citation: str = ""
    note: str = ""
    remote: bool = False
    """The path was an address, which is `url`."""
    address: str = field(default="", repr=False)
    """What is asked for then: `url`, or with a signature that is never recorded."""
    fetched: bool = False
    """The file of that address lies at `path`, which names nothing before."""

    def is_of(self, species: str) -> bool:
        """Tell whether the manifest lets the dataset be of a species.

        Args:
            species: That of the gene list (`species.species_of`).
        """
        return self.organism == "auto" or is_species(self.organism, species)

    def __post_init__(self) -> None:
        """Refuse a name that could lead out of the corpus folder; keep secrets out of `url`."""
        if not is_safe_id(self.dataset_id):
            raise ValueError(f"dataset_id '{self.dataset_id[:128]}' cannot be a file name")
        url, address = public_and_full(self.url, self.address)
        object.__setattr__(self, "url", url)
        object.__setattr__(self, "address", address)

    def options(self) -> dict[str, str | int | None]:
        """Return the fields that change what is staged, for the settings hash."""
        return {name: getattr(self, name) for name in COLUMNS if name not in _NO_OPTIONS}

    def roles(self) -> dict[str, str]:
        """Return the cell annotations with a fixed name, as name to column; only those given."""
        columns = {role: getattr(self, f"{role}_column") for role in OBS_ROLES}
        return {role: column for role, column in columns.items() if column}


def read_manifest(path: str | Path) -> tuple[Dataset, ...]:
    """Read and check a manifest.

    Args:
        path: Table with a header line (tab-separated), or YAML: a list of mappings (`.yaml`,
            `.yml`). The columns are those of COLUMNS; empty cells mean the default. Lines that
            begin with `#` are skipped.

    Returns:
        The datasets in file order. Whether their files exist is seen when each one is converted.

    Raises:
        FileNotFoundError: No such manifest.
        ValueError: Not a manifest; the message lists what is wrong by line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"manifest {path}: no such file")
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"manifest {path}: not a text file ({error.reason} at byte {error.start})"
        ) from None
    reader = _yaml_rows if path.suffix in (".yaml", ".yml") else _table_rows
    rows = reader(text, path)
    problems = _problems(rows)
    if problems:
        shown = "; ".join(problems[:_MOST_PROBLEMS])
        more = (
            f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        )
        raise ValueError(f"manifest {path}: {shown}{more}")
    return tuple(_dataset(row, path.parent) for _, row in rows)


_Rows = list[tuple[str, dict[str, str]]]


def _table_rows(text: str, path: Path) -> _Rows:
    try:
        lines = list(_lines(text))
    except csv.Error as error:
        raise ValueError(
            f"manifest {path}: a quotation mark that does not close its cell ({error}); double it "
            "or remove it"
        ) from None
    if not lines:
        raise ValueError(
            f"manifest {path}: the file is empty; it needs a header line with "
            f"{' and '.join(REQUIRED)}"
        )
    number, header = lines[0][0], [name.strip() for name in lines[0][1]]
    if len(header) == 1 and re.search("[,;]", header[0]):
        raise ValueError(f"manifest {path}: line {number}: the columns must be separated by tabs")
    _check_header(header, f"manifest {path}: line {number}")
    if len(lines) == 1:
        raise ValueError(f"manifest {path}: a header but no dataset")
    wide = [
        f"line {line}: {len(cells)} columns, the header has {len(header)}"
        for line, cells in lines[1:]
        if len(cells) > len(header)
    ]
    if wide:
        raise ValueError(f"manifest {path}: {'; '.join(wide[:_MOST_PROBLEMS])}")
    return [
        (f"line {line}", {name: cell.strip() for name, cell in zip(header, cells, strict=False)})
        for line, cells in lines[1:]
    ]


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that is neither empty nor a comment."""
    # A comment may hold any quotation marks; the empty line in its place keeps the numbers right.
    plain = ("\n" if line.startswith("#") else line for line in io.StringIO(text, newline=""))
    reader = csv.reader(plain, delimiter="\t", strict=True)
    for cells in reader:
        # Spreadsheets quote comments, and end every line in as many tabs as there are columns.
        if any(cell.strip() for cell in cells) and not cells[0].startswith("#"):
            yield reader.line_num, cells


class _TextLoader(yaml.BaseLoader):
    """Leaves all scalars text: otherwise 2024_01, 007 and 1:30 become 202401, 7 and 90."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping; a key that is no text, or given twice, is an error."""
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"line {line}: the name of a column must be text")
            if key_node.value in mapping:
                raise ValueError(f"line {line}: '{key_node.value}' is given twice in one entry")
            mapping[key_node.value] = self.construct_object(value_node, deep=True)
        return mapping


def _yaml_rows(text: str, path: Path) -> _Rows:
    try:
        content: Any = yaml.load(text, Loader=_TextLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"manifest {path}: not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise ValueError(f"manifest {path}: not a manifest (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"manifest {path}: {error}") from None
    if isinstance(content, dict) and set(content) == {"datasets"}:
        content = content["datasets"]
    if (
        not isinstance(content, list)
        or not content
        or not all(isinstance(row, dict) for row in content)
    ):
        raise ValueError(
            f"manifest {path}: expected a list with one mapping per dataset "
            f"({', '.join(REQUIRED)}, ...)"
        )
    rows: _Rows = []
    for number, row in enumerate(content, 1):
        where = f"entry {number}"
        _check_header([str(name) for name in row], f"manifest {path}: {where}")
        cells = {
            name: _cell(name, value, f"manifest {path}: {where}") for name, value in row.items()
        }
        rows.append((where, cells))
    return rows


def _cell(name: str, value: object, where: str) -> str:
    if isinstance(value, str):
        return "" if value in ("~", "null") else value
    if name == "obs_columns" and isinstance(value, list):
        return ",".join(_cell("", item, where) for item in value)
    raise ValueError(f"{where}: {name or 'obs_columns'} must be text, not a list or a mapping")


def _check_header(header: Sequence[str], where: str) -> None:
    unknown = [name for name in header if name not in COLUMNS]
    if unknown:
        raise ValueError(f"{where}: unknown column '{unknown[0]}'; allowed: {', '.join(COLUMNS)}")
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise ValueError(
            f"{where}: no column '{missing[0]}'; required (tab-separated): {', '.join(REQUIRED)}"
        )
    repeated = next((name for name in header if list(header).count(name) > 1), None)
    if repeated:
        raise ValueError(f"{where}: column '{repeated}' occurs twice")


def _problems(rows: _Rows) -> list[str]:
    problems: list[str] = []
    seen: dict[str, tuple[str, str]] = {}
    for where, row in rows:
        problems.extend(f"{where}: {name} is empty" for name in REQUIRED if not row.get(name))
        name = row.get("dataset_id", "")
        if name and not is_safe_id(name):
            problems.append(
                f"{where}: dataset_id '{name[:128]}' cannot be a file name; "
                "allowed: letters, digits, '_', '-', '.', at most 128, a letter or digit first"
            )
        # Two ids that differ only in case would share a folder on a case-insensitive file system.
        if name.lower() in seen:
            other, line = seen[name.lower()]
            differs = (
                f" as '{other}', which differs in case only: one folder on some file systems; "
                "rename one"
            )
            problems.append(
                f"{where}: dataset_id '{name}' is already on {line}{differs * (other != name)}"
            )
        elif name:
            seen[name.lower()] = name, where
        problems.extend(
            f"{where}: {name} {row[name][:200]!r} cannot be the name of a file"
            for name in ("path", "gene_list")
            if not _is_path(row.get(name, ""))
        )
        if (format := row.get("format") or "auto") not in ("auto", *FORMATS):
            problems.append(f"{where}: format '{format}', allowed: auto, {', '.join(FORMATS)}")
        try:
            if "://" in row.get("path", ""):
                check_address(row["path"])
            parse_counts(row.get("counts") or "auto")
            parse_where(row.get("where", ""))
        except ValueError as error:
            problems.append(f"{where}: {error}")
        if (id_type := row.get("id_type") or "auto") not in ID_TYPES:
            problems.append(f"{where}: id_type '{id_type}', allowed: {', '.join(ID_TYPES)}")
        problems.extend(
            f"{where}: {name} '{row[name][:20]}' is not a whole number from 1 to 999999999"
            for name in _NUMBERS
            if row.get(name) and not re.fullmatch("0*[1-9][0-9]{0,8}", row[name])
        )
        if row.get("bytes") and not re.fullmatch("[0-9]{1,15}", row["bytes"]):
            problems.append(f"{where}: bytes '{row['bytes'][:20]}' is not a number of bytes")
        if row.get("sha256") and not re.fullmatch("[0-9a-f]{64}", row["sha256"]):
            problems.append(f"{where}: sha256 '{row['sha256'][:70]}' is not 64 hex digits")
    return problems


def _is_path(text: str) -> bool:
    """Tell whether a text may be a path: no NUL, nor half a character."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _dataset(row: Mapping[str, str], folder: Path) -> Dataset:
    fields: dict[str, Any] = {name: value for name, value in row.items() if value}
    # An absolute path stays as it is when joined.
    paths = {name: folder / row[name] for name in ("path", "gene_list") if row.get(name)}
    numbers = {name: int(row[name]) for name in (*_NUMBERS, "bytes") if row.get(name)}
    if "://" in row["path"]:
        # Named when it is fetched.
        paths |= {"path": Path(row["dataset_id"])}
        return Dataset(**(fields | paths | numbers | {"url": row["path"], "remote": True}))
    return Dataset(**(fields | paths | numbers))
