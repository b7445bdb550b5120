"""The links of the chain from source files to cells, and the comparison of files with checksums.

`verify` reports for each link whether it was checked, on how many files, and if not, why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.corpus.publish import PRODUCTS
from data_prep.corpus.split.rule import RULE_FILE, read_rule
from data_prep.ledger.ledger import LedgerEntry, check_staged, read_entry
from sclong_ds.corpus.catalogue import PARTS, parts_of, read_catalogue
from sclong_ds.files.atomic import file_sha256, files_below, listed, read_file
from sclong_ds.files.checksums import check_file
from sclong_ds.page.words import counted

SOURCES = "drawn cells are those of the source files"
LEDGER = "ledger entries have their own checksum"
STAGED = "staged files are those of the ledger"
INPUTS = "settings, ledger and staged files are what finalize read"
CATALOGUE = "corpus.json has its own checksum"
FILES = "files are those of corpus.json (size, CRC-32C)"
SUMS = "files and shards are those of checksums.json (SHA-256)"
CHUNKS = "each chunk of cells is the one of its place"
CELLS = "row tables are those of the decoded cells"
MEASURED = "counts are of measured genes only"
ORIGIN = "row tables are those of the staged cells"
ROWS = "datasets, splits and annotations fit the cells"
COLUMNS = "columns are the annotations of the cells"
DUPLICATES = "no cell is there twice"
STATISTICS = "gene_stats.npz is of the training cells"
_ALL = (
    SOURCES, LEDGER, STAGED, INPUTS, CATALOGUE, FILES, SUMS, CHUNKS, CELLS, MEASURED, ORIGIN, ROWS,
    COLUMNS, DUPLICATES, STATISTICS,
)  # fmt: skip
_GONE = "not there any more"
_NOT_REACHED = "not reached, because of other problems"


class Links:
    """What was checked of the chain; every link begins as not reached."""

    def __init__(self) -> None:
        """Begin with nothing checked."""
        self._files = dict.fromkeys(_ALL, 0)
        self._reason = dict.fromkeys(_ALL, _NOT_REACHED)

    def checked(self, link: str, files: int) -> None:
        """Note a link as checked, whether it held or not.

        Args:
            link: One of the links of this module.
            files: Files that were compared; 0 if there was nothing to compare.
        """
        self._files[link], self._reason[link] = files, ""

    def skipped(self, link: str, reason: str) -> None:
        """Note why a link was not checked.

        Args:
            link: One of the links of this module.
            reason: Why not.
        """
        self._reason[link] = reason

    def add(self, other: Links) -> None:
        """Count what was checked of a part.

        Args:
            other: The links of the part.
        """
        for link, n_files in other._files.items():
            self._files[link] += n_files
            if not other._reason[link] or self._reason[link] == _NOT_REACHED:
                self._reason[link] = other._reason[link]

    def report(self) -> list[dict[str, Any]]:
        """Return per link: link, checked (bool), files and reason (empty if checked)."""
        return [
            {"link": link, "checked": not reason, "files": self._files[link], "reason": reason}
            for link, reason in self._reason.items()
        ]


def links_text(links: list[dict[str, Any]]) -> str:
    """Return what `Links.report` records, a line each.

    Args:
        links: The report.
    """
    lines = []
    for link in links:
        state = f"checked, {counted(link['files'], 'file')}" if link["checked"] else "not checked"
        reason = f" ({link['reason']})" if link["reason"] else ""
        lines.append(f"  {link['link']}: {state}{reason}")
    return "\n".join(lines)


def check_files(
    corpus: Path, catalogue: Mapping[str, Any], links: Links, problems: list[str]
) -> int:
    """Compare every file of a corpus, and its inputs that are still there, with its checksums.

    Args:
        corpus: Corpus folder.
        catalogue: Its catalogue.
        links: Filled in.
        problems: Filled in.

    Returns:
        Number of files read.
    """
    n_rule = _check_rule(corpus, catalogue, problems)
    known = {*(part.folder for part in parts_of(catalogue)), *catalogue.get("files", ())}
    there = [path.relative_to(corpus).as_posix() for path in listed(corpus / PARTS)]
    problems += [f"{name}: not part of the corpus" for name in there if name not in known]
    if PARTS not in catalogue:
        return n_rule + _check_corpus(
            corpus, catalogue, links, problems, root=corpus, is_part=False
        )
    _check_record(corpus, catalogue, links, problems)
    n_files = _check_inputs(corpus, catalogue["documents"], links, problems)
    for part in parts_of(catalogue):
        found: list[str] = []
        own = Links()
        try:
            about = read_catalogue(corpus, name=part.catalogue)
            folder = corpus / part.folder
            n_files += _check_corpus(folder, about, own, found, root=corpus, is_part=True)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        links.add(own)
        # Inputs lie in the corpus folder whatever the part.
        problems += [text if _is_input(text) else _inside(part.folder, text) for text in found]
    return n_files + n_rule


def _is_input(text: str) -> bool:
    return text.startswith(("staging/", "ledger/", "settings.json"))


def _inside(folder: str, text: str) -> str:
    return f"{folder}/{text}" if folder else text


def _check_corpus(
    folder: Path,
    catalogue: Mapping[str, Any],
    links: Links,
    problems: list[str],
    *,
    root: Path,
    is_part: bool,
) -> int:
    """Compare the files of a corpus that is no list of parts; its inputs lie in `root`."""
    _check_record(folder, catalogue, links, problems)
    path = folder / "checksums.json"
    if not path.is_file():
        problems.append("checksums.json: missing")
        return 0
    if file_sha256(path) != catalogue.get("checksums_sha256"):
        problems.append("checksums.json: damaged (its checksum differs)")
        return 1
    checksums = json.loads(read_file(path))
    for name, expected in checksums["files"].items():
        if not (folder / name).is_file():
            problems.append(f"{name}: missing")
        elif file_sha256(folder / name) != expected:
            problems.append(f"{name}: damaged (its checksum differs)")
    # A part holds nothing else; beside the first one lie the inputs and what is no part of it.
    products = PRODUCTS[:-1] if folder == root else ("",)
    found = {
        path.relative_to(folder).as_posix()
        for product in products
        for path in (folder / product, *files_below(folder / product))
        if path.is_file()
    }
    known = {*checksums["files"], "checksums.json", "corpus.json"}
    problems += [f"{name}: not part of the corpus" for name in sorted(found - known)]
    links.checked(SUMS, len(checksums["files"]))
    inputs = checksums["inputs"]
    if is_part:
        # The list has the ledger of now: what was left out of an earlier part may be in a later.
        inputs = {name: sha for name, sha in inputs.items() if name.startswith("staging/")}
    n_inputs = _check_inputs(root, inputs, links, problems)
    return len(checksums["files"]) + n_inputs + 2


def _check_rule(corpus: Path, catalogue: Mapping[str, Any], problems: list[str]) -> int:
    """Compare the rule of the split that lies in the folder with the catalogue's; 1 if it does."""
    if not (corpus / RULE_FILE).exists():
        return 0
    try:
        found = read_rule(corpus)
        stored = catalogue.get("split_rule")
        if found is not None and stored is not None:
            # Written before corpus.json, it may know datasets that a killed finalize was to add.
            found = replace(found, datasets=found.datasets[: len(stored["datasets"])])
        if found is not None and found.as_json() != stored:
            problems.append(f"{RULE_FILE}: not the rule by which this corpus was split")
    except ValueError as error:
        problems.append(str(error))
    return 1


def _check_record(
    corpus: Path, catalogue: Mapping[str, Any], links: Links, problems: list[str]
) -> None:
    """Compare the files that corpus.json holds the size and CRC-32C of."""
    if "files" not in catalogue:
        links.skipped(FILES, "the corpus is of version 1")
        return
    for name, (size, crc32c) in catalogue["files"].items():
        try:
            check_file(corpus / name, (size, crc32c), cure="restore the file or run finalize")
        except (ValueError, OSError) as error:
            problems.append(f"{name}: not the file of corpus.json ({error})")
    links.checked(FILES, len(catalogue["files"]))


def _check_inputs(
    corpus: Path, inputs: Mapping[str, str], links: Links, problems: list[str]
) -> int:
    """Compare the inputs of finalize that are still there; return their number."""
    # Staging may be deleted once the corpus is finished, so only changes count.
    present = [name for name in inputs if (corpus / name).is_file()]
    problems += [
        f"{name}: differs from what finalize read (damaged, or converted again: run finalize)"
        for name in present
        if file_sha256(corpus / name) != inputs[name]
    ]
    links.checked(INPUTS, len(present)) if present else links.skipped(INPUTS, _GONE)
    paths = [corpus / name for name in present if name.startswith("ledger/")]
    entries = []
    for path in paths:
        try:
            entries.append(read_entry(path))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    links.checked(LEDGER, len(paths)) if paths else links.skipped(LEDGER, _GONE)
    _check_staging(corpus, entries, links, problems)
    return len(present)


def _check_staging(
    corpus: Path, entries: list[LedgerEntry], links: Links, problems: list[str]
) -> None:
    """Compare the staged files that are still there with their ledger entries."""
    n_files = 0
    for entry in entries:
        there = (corpus / "staging" / entry["dataset_id"]).is_dir()
        if entry["status"] != "ok" or entry["version"] == 1 or not there:
            continue
        n_files += len(entry["files"])
        try:
            check_staged(corpus, entry)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    links.checked(STAGED, n_files) if n_files else links.skipped(STAGED, _GONE)
