"""Title, publication, licence and version of the datasets of a corpus: `CITATIONS.md`.

    text = citations_text(corpus.datasets)

`finalize` writes the text into the corpus; the data report has the same table, and an exported
model names the datasets that it was trained on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sclong_ds.corpus.catalogue import DatasetInfo
from sclong_ds.page.words import counted

UNKNOWN = "not recorded"
COLUMNS = ("title", "licence", "version", "doi")
"""Facts with a column of their own; `citation` is long."""
_DOI = re.compile(r"10\.\d{4,9}/\S+")
_HEAD = """\
# Data of this corpus

Title, licence, version and publication of every dataset, as its publisher or its file states them.
Whoever uses the corpus, or a model that was trained on it, cites the datasets and keeps to their
licences. Written by `python -m data_prep finalize`.

"""


def citations_text(datasets: Sequence[DatasetInfo]) -> str:
    """Return the text of CITATIONS.md.

    Args:
        datasets: Those of the corpus.
    """
    used = [dataset for dataset in datasets if dataset.n_cells]
    named = [dataset for dataset in used if dataset.origin]
    n_cells = sum(dataset.n_cells for dataset in used)
    lines = [
        f"{counted(n_cells, 'cell')} of {counted(len(used), 'dataset')}. "
        f"Licences: {licences_text(used)}.",
        "",
    ]
    if named:
        rows = [
            (d.dataset_id, *(facts_of(d)[name] for name in COLUMNS), f"{d.n_cells:,}")
            for d in named
        ]
        lines += ["## Datasets", "", table(("dataset", *COLUMNS, "cells"), rows)]
        lines += ["## Citations", "", *(f"- {line}" for line in _citations(named)), ""]
    nameless = [dataset for dataset in used if not dataset.origin]
    if nameless:
        lines += [
            "## Without a record of their source",
            "",
            "Neither the manifest nor the file names title, publication or licence (manifest "
            "columns title, doi, licence, version, citation):",
            "",
            *(
                f"- {dataset.dataset_id} ({counted(dataset.n_cells, 'cell')})"
                for dataset in nameless
            ),
            "",
        ]
    return _HEAD + "\n".join(lines)


def facts_of(dataset: DatasetInfo) -> dict[str, str]:
    """Return what is recorded of the source of a dataset, with UNKNOWN for the rest of COLUMNS."""
    return dict.fromkeys(COLUMNS, UNKNOWN) | dict(dataset.origin or {})


def licences_text(datasets: Iterable[DatasetInfo]) -> str:
    """Return the licences of datasets with their numbers, the most frequent first."""
    found = Counter(facts_of(dataset)["licence"] for dataset in datasets)
    return ", ".join(
        f"{name} ({n:,} {'dataset' if n == 1 else 'datasets'})" for name, n in found.most_common()
    )


def doi_address(text: str) -> str | None:
    """Return the address of a publication, or None where a text holds no DOI.

    Args:
        text: A DOI, bare or within an address.
    """
    found = _DOI.search(text)
    return f"https://doi.org/{found[0]}" if found else None


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table of Markdown; no text breaks it.

    Args:
        head: Headings.
        rows: Cells of each row.
    """
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(str(cell)) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"([|<>])", r"\\\1", " ".join(text.split()))


def _citations(datasets: Sequence[DatasetInfo]) -> list[str]:
    """Return each citation once, with the datasets that it is of."""
    of: dict[str, list[str]] = {}
    for dataset in datasets:
        origin: Mapping[str, str] = dataset.origin or {}
        text = origin.get("citation") or doi_address(origin.get("doi", "")) or origin.get("doi")
        if text or origin.get("url"):
            of.setdefault(_cell(text or origin["url"]), []).append(dataset.dataset_id)
    return [f"{text} ({', '.join(names)})" for text, names in of.items()]
