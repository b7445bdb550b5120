"""The list of datasets to convert: a tab-separated table or a YAML list.

Only `dataset_id` and `path` are required. All problems of a table are reported together, by line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.readers import FORMATS

COLUMNS: Mapping[str, str] = {
    "dataset_id": "name of the dataset: letters, digits, '_', '-' and '.', unique (required)",
    "path": "file or folder, relative to the folder of the manifest (required)",
    "format": f"auto (default) or one of {', '.join(FORMATS)}",
    "organism": "human (default); anything else is excluded",
    "tissue": "free text, kept with the dataset",
    "obs_columns": "cell annotations to keep, comma-separated; * all, none: none; empty: the usual",
    "donor_column": "cell annotation that names the donor; kept as 'donor' (used by the split)",
    "counts": "matrix with the raw counts: auto (default), X, raw.X or layers/NAME",
    "gene_column": "column that names the genes: auto (default), index or the name of one",
    "genome": "genome to keep of a 10x file with several: auto (default) or its name",
    "note": "free text, ignored",
}
REQUIRED = ("dataset_id", "path")
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_COUNTS = re.compile(r"auto|X|raw\.X|layers/.+")
_HUMAN = ("human", "homo sapiens", "homo_sapiens", "ncbitaxon:9606", "9606")
_MOST_PROBLEMS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One line of a manifest; the fields are those of COLUMNS."""

    dataset_id: str
    path: Path
    format: str = "auto"
    organism: str = "human"
    tissue: str = ""
    obs_columns: str = ""
    donor_column: str = ""
    counts: str = "auto"
    gene_column: str = "auto"
    genome: str = "auto"
    note: str = ""

    @property
    def is_human(self) -> bool:
        """Whether the manifest calls the dataset human."""
        return self.organism.lower() in _HUMAN

    def options(self) -> dict[str, str]:
        """Return the fields that change what is staged, for the settings hash."""
        names = (
            "format",
            "organism",
            "tissue",
            "obs_columns",
            "donor_column",
            "counts",
            "gene_column",
            "genome",
        )
        return {name: getattr(self, name) for name in names}


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
        text = path.read_bytes().decode("utf-8-sig")
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
    lines = [
        (number, line.split("\t"))
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]
    if not lines:
        raise ValueError(
            f"manifest {path}: the file is empty; it needs a header line with "
            f"{' and '.join(REQUIRED)}"
        )
    number, header = lines[0][0], [name.strip() for name in lines[0][1]]
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


def _yaml_rows(text: str, path: Path) -> _Rows:
    try:
        content: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"manifest {path}: not YAML ({' '.join(str(error).split())})") from None
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
        _check_header([str(name) for name in row], f"manifest {path}: entry {number}")
        rows.append((f"entry {number}", {str(name): _cell(value) for name, value in row.items()}))
    return rows


def _cell(value: object) -> str:
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


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
    seen: dict[str, str] = {}
    for where, row in rows:
        problems.extend(f"{where}: {name} is empty" for name in REQUIRED if not row.get(name))
        name = row.get("dataset_id", "")
        if name and not _SAFE_ID.fullmatch(name):
            problems.append(
                f"{where}: dataset_id '{name}' cannot be a file name; "
                "allowed: letters, digits, '_', '-', '.', at most 128, a letter or digit first"
            )
        # Two ids that differ only in case would share a folder on a case-insensitive file system.
        if name.lower() in seen:
            problems.append(f"{where}: dataset_id '{name}' is already on {seen[name.lower()]}")
        elif name:
            seen[name.lower()] = where
        if (format := row.get("format") or "auto") not in ("auto", *FORMATS):
            problems.append(f"{where}: format '{format}', allowed: auto, {', '.join(FORMATS)}")
        if not _COUNTS.fullmatch(counts := row.get("counts") or "auto"):
            problems.append(f"{where}: counts '{counts}', allowed: auto, X, raw.X, layers/NAME")
    return problems


def _dataset(row: Mapping[str, str], folder: Path) -> Dataset:
    fields: dict[str, Any] = {name: value for name, value in row.items() if value}
    # An absolute path stays as it is when joined.
    return Dataset(**(fields | {"path": folder / row["path"]}))
