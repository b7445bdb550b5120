"""The quality report of a corpus: one HTML page that needs no other file.

    python -m data_prep report CORPUS --out qc.html [--json]

Reads the ledger and the row tables of the cells (of the finished corpus, else of what is staged;
no counts are decoded). Shows the outcome of the datasets and the reasons, cells a dataset, genes
and counts a cell, how much of each dataset is kept, restored counts, dropped cells by reason,
tissues, warnings, the datasets that stand out (names of several genes among them), sources and
licences, and a table of all that can be searched and sorted. Memory: about 30 bytes a cell.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from data_prep.ledger.ledger import LedgerEntry, count_statuses, origin_of
from data_prep.report import qc_figures
from data_prep.report.qc_summary import EDGES, Dataset, Summary, counts_of, summarize
from data_prep.report.qc_tables import BADGES, COLUMNS, SOURCE_COLUMNS, cell, number, sheet
from sclong_ds.datasheet.citations import UNKNOWN
from sclong_ds.datasheet.health import health_of
from sclong_ds.files.atomic import write_atomic
from sclong_ds.page import html
from sclong_ds.page.words import counted

TEMPLATE = Path(__file__).parents[1] / "resources" / "qc_report.html"
FEW_DATASETS = 24
"""Up to so many, each dataset has a bar of its own; more are drawn as distributions."""
WORST = 20


def run(args: argparse.Namespace) -> int:
    """Write the page; return the exit status."""
    summary = summarize(args.corpus)
    write_atomic(args.out, page(summary).encode())
    facts = {
        "out": str(args.out),
        "finalized": summary.catalogue is not None,
        "health": health_of(summary.catalogue).as_json() if summary.catalogue else None,
        "counts": count_statuses([dataset.entry for dataset in summary.datasets]),
        "n_pending": len(summary.pending),
        "n_cells": summary.n_cells,
        "median_genes": number(summary.median_genes),
        "median_counts": number(summary.median_counts),
        "cells": counts_of(summary).as_json(),
        "annotations": summary.annotations,
        "warnings": {d.entry["dataset_id"]: d.entry["warnings"] for d in _warned(summary)},
    }
    text = (
        f"{args.out}: {counted(summary.n_cells, 'cell')} of {counted(len(summary.used), 'dataset')}"
    )
    print(json.dumps(facts, indent=1) if args.json else text)
    return 0


def page(summary: Summary) -> str:
    """Return the HTML of the report.

    Args:
        summary: Of a corpus.
    """
    sections = [*_health(summary), _datasets(summary), *_warnings(summary)]
    if summary.used:
        sections += [_cells(summary), _coverage(summary), *_restored(summary)]
        sections += [
            _annotated(summary),
            _losses(summary),
            *_standing_out(summary),
            _sources(summary),
        ]
    return html.render(
        TEMPLATE,
        title=summary.corpus.resolve().name,
        kind="data report",
        status=_status(summary),
        facts=html.cards(_facts(summary)),
        sections=sections,
        datasets=sheet(COLUMNS, summary.datasets, id="datasets", tall=True),
        footer=_footer(summary),
    )


def _section(title: str, **content: Any) -> dict[str, Any]:
    """Return what the template reads of a section: badge, text, findings, figures, tables."""
    empty = {"id": "", "badge": None, "text": "", "findings": (), "figures": (), "tables": ()}
    return {"title": title, **empty, **content}


def _status(summary: Summary) -> Markup:
    if summary.catalogue is None:
        text = (
            "not finalized: cells as staged, duplicates still among them; run sclong-prep finalize"
        )
        return html.badge("warn", "staged") + text
    waiting = [d for d in summary.datasets if d.entry["status"] == "ok" and d.info is None]
    if waiting:
        number = counted(len(waiting), "dataset")
        text = f"{number} converted after it: run finalize again"
        return html.badge("warn", "corpus is older") + text
    unit = {"cell": "single cells"}.get(summary.catalogue["split_unit"])
    held_out = unit or f"whole {summary.catalogue['split_unit']}s"
    return html.badge("good", "finished corpus") + f"validation and test hold {held_out}"


def _health(summary: Summary) -> list[dict[str, Any]]:
    """Return the verdict on the finished corpus, with what to do."""
    if summary.catalogue is None:
        return []
    health = health_of(summary.catalogue)
    kinds = {"green": "good", "amber": "warn", "red": "bad"}
    findings = [(kinds[f.level], f.level, f"{f.reason}; {f.cure}.") for f in health.findings]
    text = "" if findings else "Nothing speaks against training on it."
    badge = kinds[health.verdict], health.verdict
    return [_section("Health", badge=badge, text=text, findings=findings)]


def _facts(summary: Summary) -> list[tuple[str, str, str]]:
    """Return the main figures: name, value, and what goes with it."""
    entries = [dataset.entry for dataset in summary.datasets]
    statuses = count_statuses(entries)
    numbers = statuses | ({"pending": len(summary.pending)} if summary.pending else {})
    others = ", ".join(f"{n:,} {name}" for name, n in numbers.items() if name != "ok")
    input_counts = sum(d.entry["counts_input"] for d in summary.used)
    kept = sum(d.entry["counts_input"] * (d.entry["counts_kept"] or 0) for d in summary.used)
    cells = counts_of(summary)
    rest = f"of {cells.read:,} read, {cells.n_dropped:,} dropped"
    facts = [
        ("cells kept", f"{cells.kept:,}", rest),
        ("datasets used", f"{statuses['ok']:,} of {sum(numbers.values()):,}", others),
        ("genes a cell, median", _whole(summary.median_genes), ""),
        ("counts a cell, median", _whole(summary.median_counts), ""),
    ]
    if input_counts:
        facts.append(
            ("counts on known genes", f"{kept / input_counts:.1%}", "of all datasets used")
        )
    warned = _warned(summary)
    if warned:
        number = sum(len(dataset.entry["warnings"]) for dataset in warned)
        facts.append(("warnings", f"{number:,}", f"about {counted(len(warned), 'dataset')}"))
    if summary.catalogue:
        sizes = {name: stop - start for name, (start, stop) in summary.catalogue["splits"].items()}
        held = ", ".join(f"{n:,} {name}" for name, n in sizes.items() if name != "train" and n)
        facts.append(("training cells", f"{sizes['train']:,}", held))
    return facts


def _datasets(summary: Summary) -> dict[str, Any]:
    statuses = count_statuses([dataset.entry for dataset in summary.datasets])
    colors = {"ok": qc_figures.BLUE, "excluded": qc_figures.ORANGE, "failed": qc_figures.RED}
    parts = [(name, number, colors[name]) for name, number in statuses.items()]
    seen = ", ".join(f"{number:,} {name}" for name, number in statuses.items())
    picture = qc_figures.stacked(parts, xlabel="datasets")
    figures = [_figure("Outcome of the datasets", "", picture, seen)]
    if summary.used:
        sizes = {d.entry["dataset_id"]: float(d.n_cells) for d in summary.used}
        figures.append(_per_dataset("Cells a dataset", sizes, xlabel="cells", log=True))
    groups: dict[tuple[str, str], list[str]] = {}
    for dataset in summary.datasets:
        entry = dataset.entry
        if entry["status"] != "ok":
            groups.setdefault((entry["status"], _pattern(entry)), []).append(entry["dataset_id"])
    rows = [
        (
            "",
            [
                cell(f"{len(names):,}", "n"),
                cell(status, badge=BADGES[status]),
                cell(reason, "long"),
                cell(f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"),
            ],
        )
        for (status, reason), names in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    why = {
        "title": "Why datasets are not used",
        "text": "N stands for a number, FILE and DATASET for a name; the full text is in the last "
        "table.",
        "head": [("datasets", True), ("outcome", False), ("reason", False), ("for example", False)],
        "rows": rows,
        "id": "",
        "tall": False,
    }
    return _section("Datasets", figures=figures, tables=[why] if groups else [])


def _warned(summary: Summary) -> list[Dataset]:
    """Return the datasets that are ok and have warnings, those with most first."""
    found = [d for d in summary.datasets if d.entry["status"] == "ok" and d.entry["warnings"]]
    return sorted(found, key=lambda dataset: -len(dataset.entry["warnings"]))


def _warnings(summary: Summary) -> list[dict[str, Any]]:
    """Return a table of what looks wrong with datasets that are used all the same, if any."""
    warned = _warned(summary)
    if not warned:
        return []
    rows = [
        ("", [cell(dataset.entry["dataset_id"]), cell(warning, "long")])
        for dataset in warned
        for warning in dataset.entry["warnings"]
    ]
    text = (
        f"{len(rows):,} about {len(warned):,} of the datasets used: what looks wrong and does not "
        "exclude a dataset."
    )
    head = [("dataset", False), ("warning", False)]
    sheet = {"title": "", "text": "", "head": head, "rows": rows, "id": "", "tall": True}
    return [_section("Warnings", id="warnings", text=text, tables=[sheet])]


def _cells(summary: Summary) -> dict[str, Any]:
    counts, genes = summary.density.sum(axis=1), summary.density.sum(axis=0)
    median = f"median {_whole(summary.median_genes)}", f"median {_whole(summary.median_counts)}"
    cells = counted(summary.n_cells, "cell")
    figures = [
        _figure("Genes a cell", "genes of the vocabulary with at least one count",
                qc_figures.histogram(genes, EDGES, xlabel="genes a cell", ylabel="cells",
                                     median=summary.median_genes, log=True),
                f"Histogram of {cells}, {median[0]}"),
        _figure("Counts a cell", "after mapping to the vocabulary",
                qc_figures.histogram(counts, EDGES, xlabel="counts a cell", ylabel="cells",
                                     median=summary.median_counts, log=True),
                f"Histogram of {cells}, {median[1]}"),
        _figure("Genes and counts of the cells", "a second cloud is often another technology",
                qc_figures.density(summary.density, EDGES, EDGES),
                f"Density of {cells} by counts and genes, around {median[1]} and {median[0]}"),
        _figure("Median cell of each dataset", "points far off the others are worth a look",
                qc_figures.dataset_points(
                    np.array([d.median_counts for d in summary.used]),
                    np.array([d.median_genes for d in summary.used]),
                    np.array([d.entry["counts_kept"] or 0.0 for d in summary.used])),
                f"{counted(len(summary.used), 'dataset')}, medians of "
                f"{_range([d.median_counts for d in summary.used])} counts and "
                f"{_range([d.median_genes for d in summary.used])} genes a cell"),
    ]  # fmt: skip
    return _section("Cells", figures=figures)


def _coverage(summary: Summary) -> dict[str, Any]:
    kept = {d.entry["dataset_id"]: d.entry["counts_kept"] or 0.0 for d in summary.used}
    mapped = {d.entry["dataset_id"]: float(d.entry["n_genes_mapped"]) for d in summary.used}
    figures = [
        _per_dataset("Counts kept", kept, xlabel="counts on known genes", percent=True),
        _per_dataset("Genes mapped", mapped, xlabel="genes of the vocabulary reached"),
    ]
    text = (
        "How much of each dataset fell on genes of the vocabulary. Low values mean old gene names, "
        "another annotation, or a dataset with a selection of genes."
    )
    return _section("Coverage", text=text, figures=figures)


def _restored(summary: Summary) -> list[dict[str, Any]]:
    """Return a table of the datasets whose counts are not those of the file, if any."""
    restored = [dataset for dataset in summary.used if dataset.entry["restored"]]
    if not restored:
        return []
    names = ("dataset", "tissue", "cells", "dropped", "matrix", "restored")
    columns = [column for column in COLUMNS if column[0] in names]
    verb = "holds" if len(restored) == 1 else "hold"
    text = (
        f"{counted(len(restored), 'dataset')} {verb} no raw counts; they were computed back, with "
        "a proof for each cell. Cells without one are dropped."
    )
    return [_section("Restored counts", text=text, tables=[sheet(columns, restored)])]


def _annotated(summary: Summary) -> dict[str, Any]:
    """Return the cells by tissue, assay, cell type and what else the corpus has of them."""
    by: dict[str, Mapping[str, int]] = {**summary.annotations}
    note = "as the cells' annotation names it"
    if "tissue" not in by:
        tissues: Counter[str] = Counter()
        for dataset in summary.used:
            tissues[dataset.entry["tissue"].strip()] += dataset.n_cells
        by = {"tissue": dict(tissues.most_common()), **by}
        note = "as the manifest names it"
    figures = []
    for name, numbers in by.items():
        shown = {label or "not given": number for label, number in [*numbers.items()][:WORST]}
        if len(numbers) > WORST:
            others = sum(numbers.values()) - sum(shown.values())
            shown[f"{len(numbers) - WORST} others"] = others
        picture = qc_figures.bars(shown, xlabel="cells")
        title = f"Cells by {name.replace('_', ' ')}"
        figures.append(_figure(title, note, picture, _listed(shown)))
    return _section("Annotations of the cells", figures=figures)


def _losses(summary: Summary) -> dict[str, Any]:
    """Return what became of the cells that were read."""
    cells, figures = counts_of(summary), []
    if cells.dropped:
        picture = qc_figures.bars(cells.dropped, xlabel="cells dropped", color=qc_figures.ORANGE)
        figures = [_figure("Cells dropped, by reason", "", picture, _listed(cells.dropped))]
    return _section("Cells read, kept and dropped", text=f"{cells.text()}.", figures=figures)


def _standing_out(summary: Summary) -> list[dict[str, Any]]:
    """Return tables of the datasets with the least coverage, the poorest cells, most loss."""
    tables = []
    names = (
        "dataset",
        "tissue",
        "cells",
        "counts kept",
        "ambiguous names",
        "genes a cell",
        "counts a cell",
        "dropped",
    )
    columns = [column for column in COLUMNS if column[0] in names]
    orders: Sequence[tuple[str, Callable[[Dataset], float]]] = (
        ("Fewest counts on known genes", lambda d: d.entry["counts_kept"] or 0.0),
        ("Most gene names of several genes", lambda d: -d.ambiguous),
        ("Fewest genes a cell", lambda d: d.median_genes),
        ("Most cells dropped", lambda d: -d.lost),
    )
    for title, key in orders:
        middle = float(np.median([key(dataset) for dataset in summary.used]))
        worst = [d for d in sorted(summary.used, key=key)[:WORST] if key(d) < middle]
        if worst:
            tables.append(sheet(columns, worst, title=title))
    if not tables:
        return []
    text = f"At most {WORST} each, of those below the median dataset."
    return [_section("Datasets that stand out", text=text, tables=tables)]


def _sources(summary: Summary) -> dict[str, Any]:
    """Return the table of titles, publications and licences, or how to record them."""
    title = "Sources and licences"
    named = [dataset for dataset in summary.used if origin_of(dataset.entry)]
    if not named:
        text = (
            "No dataset names its title, publication or licence: give them in the manifest columns "
            "title, doi, licence, version and citation, and run convert and finalize again."
        )
        return _section(title, text=text)
    licences: Counter[str] = Counter()
    for dataset in summary.used:
        licences[origin_of(dataset.entry).get("licence", UNKNOWN)] += 1
    numbers = ", ".join(f"{name} ({number:,})" for name, number in licences.most_common())
    text = (
        f"Datasets by licence: {numbers}. The same, with how to cite each, is CITATIONS.md of the "
        "finished corpus."
    )
    return _section(title, text=text, tables=[sheet(SOURCE_COLUMNS, named, tall=True)])


def _per_dataset(
    title: str,
    values: Mapping[str, float],
    *,
    xlabel: str,
    log: bool = False,
    percent: bool = False,
) -> Markup:
    """Draw a bar for each of a few datasets, the distribution of many."""
    if len(values) <= FEW_DATASETS:
        picture = qc_figures.bars(values, xlabel=xlabel, percent=percent)
        return _figure(title, "", picture, _listed(values, percent=percent))
    numbers = np.array(list(values.values()))
    low, high = float(numbers.min()), float(numbers.max())
    n_bins = int(np.clip(2 * np.sqrt(len(numbers)), 10, 40))
    if log:
        edges = np.geomspace(low / 1.05, high * 1.05, n_bins + 1)
    else:
        # Values that hardly differ get an axis on which they are seen not to.
        edges = np.linspace(min(low, 0.9 * high), max(high, 1e-6), n_bins + 1)
    picture = qc_figures.histogram(
        np.histogram(numbers, edges)[0], edges, xlabel=xlabel, ylabel="datasets",
        median=float(np.median(numbers)), log=log, percent=percent,
    )  # fmt: skip
    seen = f"Histogram of {len(values):,} datasets, {_range(numbers, percent=percent)} {xlabel}"
    return _figure(title, f"distribution over {len(values):,} datasets", picture, seen)


def _figure(title: str, note: str, picture: str, seen: str) -> Markup:
    """Return a figure; `seen` is what it shows, for who does not see it."""
    note = f"{note[0].upper()}{note[1:]}." if note else ""
    return html.image(picture.encode(), "image/svg+xml", title, note, seen=f"{seen}.")


def _listed(values: Mapping[str, float], *, percent: bool = False) -> str:
    """Return what bars show, in words."""
    return ", ".join(f"{name} {_shown(value, percent)}" for name, value in values.items())


def _range(values: Iterable[float], *, percent: bool = False) -> str:
    numbers = [value for value in values if value == value]
    if not numbers:
        return "no"
    return f"{_shown(min(numbers), percent)} to {_shown(max(numbers), percent)}"


def _shown(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:,.0f}"


def _pattern(entry: LedgerEntry) -> str:
    """Return a reason without the names and numbers that differ from dataset to dataset."""
    reason = entry["reason"].replace(entry["path"], "FILE")
    reason = re.sub(rf"(?<![\w-]){re.escape(entry['dataset_id'])}(?![\w-])", "DATASET", reason)
    reason = re.sub(r"\S*/\S+\.\S+", "FILE", reason)
    return re.sub(r"(?<![\w.])-?\d[\d.,]*(?:e[+-]?\d+)?%?", "N", reason)


def _footer(summary: Summary) -> str:
    if summary.catalogue is None:
        return "Written by sclong_ds from the ledger and the staged cells."
    catalogue = summary.catalogue
    return (
        f"Written by sclong_ds from the ledger and the corpus {catalogue['hash'][:12]}: "
        f"{catalogue['n_genes']:,} genes, seed {catalogue['options']['seed']}."
    )


def _whole(value: float) -> str:
    return "none" if value != value else f"{value:,.0f}"
