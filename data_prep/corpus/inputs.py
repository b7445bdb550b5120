"""What finalize reads: settings, ledger and staged files, compared with their checksums.

The ledger vouches for every staged file and each of its entries for itself. finalize compares all
staged files before it uses any (`data_prep.corpus.build`), and those that were written to once more
before it publishes, with all of the ledger: what it publishes is what it read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.ledger.ledger import (
    LedgerEntry,
    json_files,
    ledger_path,
    read_ledger,
    require_current,
)
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import file_sha256, read_json


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of one finalize."""

    corpus: Path
    """The corpus folder."""
    genes: GeneVocabulary
    """The vocabulary that convert used."""
    ledger: tuple[LedgerEntry, ...]
    """All entries, by name of the dataset."""
    documents: dict[str, str]
    """SHA-256 of settings.json and the ledger entries, by name in the corpus folder."""

    @property
    def used(self) -> tuple[LedgerEntry, ...]:
        """Entries of the datasets that are ok."""
        return tuple(entry for entry in self.ledger if entry["status"] == "ok")

    def checksums(self, datasets: Collection[str] | None = None) -> dict[str, str]:
        """Return the SHA-256 of every input, by its name in the corpus folder.

        Args:
            datasets: With the settings and what belongs to these alone; None: of everything.
        """
        staged = {
            f"staging/{entry['dataset_id']}/{name}": str(digest)
            for entry in self.used
            if datasets is None or entry["dataset_id"] in datasets
            for name, (_, digest) in entry["files"].items()
        }
        entries = [ledger_path(self.corpus, name) for name in datasets or ()]
        wanted = {"settings.json", *(p.relative_to(self.corpus).as_posix() for p in entries)}
        documents = self.documents
        if datasets is not None:
            documents = {name: digest for name, digest in documents.items() if name in wanted}
        return documents | staged

    def check_documents(self) -> None:
        """Compare settings.json and the ledger with their checksums.

        Raises:
            ValueError: One of them is missing or changed.
        """
        for name, digest in self.documents.items():
            path = self.corpus / name
            if not path.is_file() or file_sha256(path) != digest:
                raise ValueError(f"{path}: changed while finalize was at work; start it again")


def read_inputs(corpus: Path) -> Inputs:
    """Read settings, vocabulary and ledger of a corpus folder; staged files are not compared yet.

    Args:
        corpus: The corpus folder, in which no convert is at work.

    Raises:
        FileNotFoundError: No settings, vocabulary or ledger.
        ValueError: One of them is damaged, or a dataset was staged by an older version.
    """
    # Hashed before they are read: a change in between is seen by the comparison at the end.
    documents = _hashes(corpus, [corpus / "settings.json", *_entry_paths(corpus)])
    ledger = read_ledger(corpus)
    require_current(corpus, ledger)
    return Inputs(
        corpus=corpus, genes=_vocabulary(corpus), ledger=tuple(ledger), documents=documents
    )


def _entry_paths(corpus: Path) -> list[Path]:
    return [ledger_path(corpus, path.stem) for path in json_files(corpus / "ledger")]


def _hashes(corpus: Path, paths: Sequence[Path]) -> dict[str, str]:
    return {p.relative_to(corpus).as_posix(): file_sha256(p) for p in paths if p.is_file()}


def _vocabulary(corpus: Path) -> GeneVocabulary:
    """Return the vocabulary that convert used, checked against its hash in settings.json."""
    genes = GeneVocabulary.read(corpus / "genes.tsv")
    path = corpus / "settings.json"
    cure = "restore genes.tsv or convert into a new folder"
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: missing; run: python -m data_prep convert MANIFEST --out {corpus}"
        )
    settings = read_json(path, cure="convert into a new folder")
    if not isinstance(settings, dict) or not isinstance(settings.get("genes_hash"), str):
        raise ValueError(f"{path}: damaged (no genes_hash); convert into a new folder")
    if settings["genes_hash"] != genes.hash:
        raise ValueError(
            f"{corpus / 'genes.tsv'}: gene hash {genes.hash}, {path.name} says "
            f"{settings['genes_hash']}; {cure}"
        )
    # Absent before staging version 2.
    if settings.get("genes_sha256", genes.table_sha256) != genes.table_sha256:
        raise ValueError(
            f"{corpus / 'genes.tsv'}: other symbols or classes than the cells were converted "
            f"with, as {path.name} says; {cure}"
        )
    return genes
