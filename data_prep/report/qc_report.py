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
import html
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from data_prep.ledger.ledger import LedgerEntry, count_statuses, origin_of
from data_prep.report import qc_figures
from data_prep.report.qc_summary import EDGES, Dataset, Summary, dropped_cells, summarize
from sclong_ds.datasheet.citations import UNKNOWN
from sclong_ds.datasheet.health import health_of
from sclong_ds.files.atomic import write_atomic

TEMPLATE = Path(__file__).parents[1] / "resources" / "qc_report.html"
FEW_DATASETS = 24
"""Up to so many, each dataset has a bar of its own; more are drawn as distributions."""
WORST = 20
_LONG = ("reason", "restored", "title", "citation")
"""Columns of sentences."""


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
        "median_genes": _number(summary.median_genes),
        "median_counts": _number(summary.median_counts),
        "dropped_cells": dropped_cells(summary),
        "warnings": {d.entry["dataset_id"]: d.entry["warnings"] for d in _warned(summary)},
    }
    text = f"{args.out}: {summary.n_cells} cells of {len(summary.used)} datasets"
    print(json.dumps(facts, indent=1) if args.json else text)
    return 0


def page(summary: Summary) -> str:
    """Return the HTML of the report.

    Args:
        summary: Of a corpus.
    """
    parts = [_health(summary), _datasets(summary), _warnings(summary)]
    if summary.used:
        parts += [_cells(summary), _coverage(summary), _restored(summary)]
        parts += [_losses(summary), _standing_out(summary), _sources(summary)]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(summary.corpus.resolve().name),
        status=_status(summary),
        facts=_facts(summary),
        body="\n".join(parts),
        table=_table(_COLUMNS, summary.datasets, name="datasets"),
        footer=_footer(summary),
    )


def _status(summary: Summary) -> str:
    if summary.catalogue is None:
        text = ("not finalized: cells as staged, duplicates still among them; "
                "run <code>python -m data_prep finalize</code>")  # fmt: skip
        return f'<span class="tag excluded">staged</span> {text}'
    waiting = [d for d in summary.datasets if d.entry["status"] == "ok" and d.info is None]
    if waiting:
        text = f"{len(waiting)} datasets were converted after it: run finalize again"
        return f'<span class="tag excluded">corpus is older</span> {html.escape(text)}'
    unit = {"cell": "single cells"}.get(summary.catalogue["split_unit"])
    held_out = unit or f"whole {summary.catalogue['split_unit']}s"
    return f'<span class="tag ok">finished corpus</span> validation and test hold {held_out}'


def _health(summary: Summary) -> str:
    """Return the verdict on the finished corpus, with what to do."""
    if summary.catalogue is None:
        return ""
    health = health_of(summary.catalogue)
    tags = {"green": "ok", "amber": "excluded", "red": "failed"}
    rows = "".join(
        f'<li><span class="tag {tags[f.level]}">{f.level}</span> {html.escape(f.reason)}; '
        f"{html.escape(f.cure)}.</li>"
        for f in health.findings
    )
    text = f"<ul>{rows}</ul>" if rows else "<p>Nothing speaks against training on it.</p>"
    tag = f'<span class="tag {tags[health.verdict]}">{health.verdict}</span>'
    return f"<h2>Health {tag}</h2>{text}"


def _facts(summary: Summary) -> str:
    entries = [dataset.entry for dataset in summary.datasets]
    statuses = count_statuses(entries)
    numbers = statuses | ({"pending": len(summary.pending)} if summary.pending else {})
    others = ", ".join(f"{n:,} {name}" for name, n in numbers.items() if name != "ok")
    input_counts = sum(d.entry["counts_input"] for d in summary.used)
    kept = sum(d.entry["counts_input"] * (d.entry["counts_kept"] or 0) for d in summary.used)
    n_dropped = sum(dropped_cells(summary).values())
    facts = [
        ("cells", f"{summary.n_cells:,}", f"{n_dropped:,} left out"),
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
        facts.append(("warnings", f"{number:,}", f"about {len(warned):,} datasets"))
    if summary.catalogue:
        sizes = {name: stop - start for name, (start, stop) in summary.catalogue["splits"].items()}
        held = ", ".join(f"{n:,} {name}" for name, n in sizes.items() if name != "train" and n)
        facts.append(("training cells", f"{sizes['train']:,}", held))
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        f"<small>{html.escape(note)}</small></dd></div>"
        for name, value, note in facts
    )


def _datasets(summary: Summary) -> str:
    statuses = count_statuses([dataset.entry for dataset in summary.datasets])
    colors = {"ok": qc_figures.BLUE, "excluded": qc_figures.ORANGE, "failed": qc_figures.RED}
    parts = [(name, number, colors[name]) for name, number in statuses.items()]
    figures = [
        _figure("Outcome of the datasets", "", qc_figures.stacked(parts, xlabel="datasets")),
    ]
    if summary.used:
        sizes = {d.entry["dataset_id"]: float(d.n_cells) for d in summary.used}
        figures.append(_per_dataset("Cells a dataset", sizes, xlabel="cells", log=True))
    text = f'<h2>Datasets</h2><div class="plots">{"".join(figures)}</div>'
    groups: dict[tuple[str, str], list[str]] = {}
    for dataset in summary.datasets:
        entry = dataset.entry
        if entry["status"] != "ok":
            groups.setdefault((entry["status"], _pattern(entry)), []).append(entry["dataset_id"])
    if not groups:
        return text
    rows = "".join(
        f'<tr><td class="n">{len(names):,}</td><td>{_tag(status)}</td>'
        f'<td class="long">{html.escape(reason)}</td>'
        f"<td>{html.escape(', '.join(names[:3]))}{' …' if len(names) > 3 else ''}</td></tr>"
        for (status, reason), names in sorted(groups.items(), key=lambda item: -len(item[1]))
    )
    head = '<tr><th class="n">datasets</th><th>outcome</th><th>reason</th><th>for example</th></tr>'
    return (
        f"{text}<h3>Why datasets are not used</h3><p>N stands for a number, FILE and DATASET for a "
        'name; the full text is in the last table.</p><div class="scroll">'
        f"<table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"
    )


def _warned(summary: Summary) -> list[Dataset]:
    """Return the datasets that are ok and have warnings, those with most first."""
    found = [d for d in summary.datasets if d.entry["status"] == "ok" and d.entry["warnings"]]
    return sorted(found, key=lambda dataset: -len(dataset.entry["warnings"]))


def _warnings(summary: Summary) -> str:
    """Return a table of what looks wrong with datasets that are used all the same, or ''."""
    warned = _warned(summary)
    if not warned:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(dataset.entry['dataset_id'])}</td>"
        f'<td class="long">{html.escape(warning)}</td></tr>'
        for dataset in warned
        for warning in dataset.entry["warnings"]
    )
    number = sum(len(dataset.entry["warnings"]) for dataset in warned)
    return (
        f'<h2 id="warnings">Warnings</h2><p>{number:,} about {len(warned):,} of the datasets used: '
        "what looks wrong and does not exclude a dataset.</p>"
        '<div class="scroll tall"><table><thead><tr><th>dataset</th><th>warning</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cells(summary: Summary) -> str:
    counts, genes = summary.density.sum(axis=1), summary.density.sum(axis=0)
    figures = [
        _figure("Genes a cell", "genes of the vocabulary with at least one count",
                qc_figures.histogram(genes, EDGES, xlabel="genes a cell", ylabel="cells",
                                     median=summary.median_genes, log=True)),
        _figure("Counts a cell", "after mapping to the vocabulary",
                qc_figures.histogram(counts, EDGES, xlabel="counts a cell", ylabel="cells",
                                     median=summary.median_counts, log=True)),
        _figure("Genes and counts of the cells", "a second cloud is often another technology",
                qc_figures.density(summary.density, EDGES, EDGES)),
        _figure("Median cell of each dataset", "points far off the others are worth a look",
                qc_figures.dataset_points(
                    np.array([d.median_counts for d in summary.used]),
                    np.array([d.median_genes for d in summary.used]),
                    np.array([d.entry["counts_kept"] or 0.0 for d in summary.used]))),
    ]  # fmt: skip
    return f'<h2>Cells</h2><div class="plots">{"".join(figures)}</div>'


def _coverage(summary: Summary) -> str:
    kept = {d.entry["dataset_id"]: d.entry["counts_kept"] or 0.0 for d in summary.used}
    mapped = {d.entry["dataset_id"]: float(d.entry["n_genes_mapped"]) for d in summary.used}
    figures = [
        _per_dataset("Counts kept", kept, xlabel="counts on known genes", percent=True),
        _per_dataset("Genes mapped", mapped, xlabel="genes of the vocabulary reached"),
    ]
    return (
        "<h2>Coverage</h2><p>How much of each dataset fell on genes of the vocabulary. Low values "
        "mean old gene names, another annotation, or a dataset with a selection of genes.</p>"
        f'<div class="plots">{"".join(figures)}</div>'
    )


def _restored(summary: Summary) -> str:
    """Return a table of the datasets whose counts are not those of the file, or ''."""
    restored = [dataset for dataset in summary.used if dataset.entry["restored"]]
    if not restored:
        return ""
    names = ("dataset", "tissue", "cells", "dropped", "matrix", "restored")
    columns = [column for column in _COLUMNS if column[0] in names]
    return (
        f"<h2>Restored counts</h2><p>The files of {len(restored):,} datasets hold no raw counts; "
        "they were computed back, with a proof for each cell. Cells without one are dropped.</p>"
        f'<div class="scroll">{_table(columns, restored)}</div>'
    )


def _losses(summary: Summary) -> str:
    tissues: Counter[str] = Counter()
    for dataset in summary.used:
        tissues[dataset.entry["tissue"].strip() or "not given"] += dataset.n_cells
    shown = dict(tissues.most_common(WORST))
    if len(tissues) > WORST:
        shown[f"{len(tissues) - WORST} others"] = tissues.total() - sum(shown.values())
    figures = [
        _figure(
            "Cells by tissue", "as the manifest names it", qc_figures.bars(shown, xlabel="cells")
        )
    ]
    dropped = dropped_cells(summary)
    if dropped:
        picture = qc_figures.bars(dropped, xlabel="cells left out", color=qc_figures.ORANGE)
        figures.append(_figure("Cells left out, by reason", "", picture))
    return f'<h2>Tissues and cells left out</h2><div class="plots">{"".join(figures)}</div>'


def _standing_out(summary: Summary) -> str:
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
    columns = [column for column in _COLUMNS if column[0] in names]
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
            tables.append(f'<h3>{title}</h3><div class="scroll">{_table(columns, worst)}</div>')
    if not tables:
        return ""
    text = f"At most {WORST} each, of those below the median dataset."
    return f"<h2>Datasets that stand out</h2><p>{text}</p>{''.join(tables)}"


def _sources(summary: Summary) -> str:
    """Return the table of titles, publications and licences, or how to record them."""
    named = [dataset for dataset in summary.used if origin_of(dataset.entry)]
    if not named:
        return (
            "<h2>Sources and licences</h2><p>No dataset names its title, publication or licence: "
            "give them in the manifest columns title, doi, licence, version and citation, and run "
            "convert and finalize again.</p>"
        )
    licences: Counter[str] = Counter()
    for dataset in summary.used:
        licences[origin_of(dataset.entry).get("licence", UNKNOWN)] += 1
    counted = ", ".join(f"{name} ({number:,})" for name, number in licences.most_common())
    return (
        f"<h2>Sources and licences</h2><p>Datasets by licence: {html.escape(counted)}. The same, "
        "with how to cite each, is CITATIONS.md of the finished corpus.</p>"
        f'<div class="scroll tall">{_table(_SOURCE_COLUMNS, named)}</div>'
    )


def _per_dataset(
    title: str,
    values: Mapping[str, float],
    *,
    xlabel: str,
    log: bool = False,
    percent: bool = False,
) -> str:
    """Draw a bar for each of a few datasets, the distribution of many."""
    if len(values) <= FEW_DATASETS:
        return _figure(title, "", qc_figures.bars(values, xlabel=xlabel, percent=percent))
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
    return _figure(title, f"distribution over {len(values):,} datasets", picture)


def _figure(title: str, note: str, picture: str) -> str:
    title, note = html.escape(title), html.escape(note)
    # The picture is text for screen readers by its title alone.
    picture = picture.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return f"<figure><figcaption>{title}<span>{note}</span></figcaption>{picture}</figure>"


def _pattern(entry: LedgerEntry) -> str:
    """Return a reason without the names and numbers that differ from dataset to dataset."""
    reason = entry["reason"].replace(entry["path"], "FILE")
    reason = re.sub(rf"(?<![\w-]){re.escape(entry['dataset_id'])}(?![\w-])", "DATASET", reason)
    reason = re.sub(r"\S*/\S+\.\S+", "FILE", reason)
    return re.sub(r"(?<![\w.])-?\d[\d.,]*(?:e[+-]?\d+)?%?", "N", reason)


Column = tuple[str, bool, Callable[[Dataset], Any]]
"""Heading, whether it is a number, and the value of a dataset."""


def _split(dataset: Dataset) -> str:
    names = [name for name, n in dataset.info.split_cells.items() if n] if dataset.info else []
    return ", ".join(names)


_COLUMNS: tuple[Column, ...] = (
    ("dataset", False, lambda d: d.entry["dataset_id"]),
    ("outcome", False, lambda d: d.entry["status"]),
    ("tissue", False, lambda d: d.entry["tissue"]),
    ("cells", True, lambda d: d.n_cells or None),
    ("dropped", True, lambda d: f"{d.lost:.1%}" if d.lost == d.lost else None),
    ("repeats", True, lambda d: d.info.duplicates_dropped if d.info else None),
    ("genes mapped", True, lambda d: d.entry["n_genes_mapped"] or None),
    ("counts kept", True, lambda d: _percent(d.entry["counts_kept"])),
    ("ambiguous names", True, lambda d: d.entry["gene_names"].get("ambiguous")),
    ("genes a cell", True, lambda d: _number(d.median_genes)),
    ("counts a cell", True, lambda d: _number(d.median_counts)),
    ("warnings", True, lambda d: len(d.entry["warnings"]) or None),
    ("split", False, _split),
    ("format", False, lambda d: d.entry["format"] or ""),
    ("matrix", False, lambda d: d.entry["matrix"] or ""),
    ("restored", False, lambda d: d.entry["restored"]),
    ("reason", False, lambda d: d.entry["reason"]),
)


def _fact(name: str) -> Column:
    return name, False, lambda d: origin_of(d.entry).get(name, "")


_SOURCE_COLUMNS: tuple[Column, ...] = (
    *(column for column in _COLUMNS if column[0] in ("dataset", "cells")),
    *map(_fact, ("title", "licence", "version", "doi", "citation")),
)


def _table(columns: Sequence[Column], datasets: Sequence[Dataset], *, name: str = "") -> str:
    """Return a table; one with a name gets headings that the page's script sorts by."""
    heads = "".join(
        f"<th{_class(numeric)}>{f'<button>{title}</button>' if name else title}</th>"
        for title, numeric, _ in columns
    )
    rows = []
    for dataset in datasets:
        cells = []
        for title, numeric, value_of in columns:
            value = value_of(dataset)
            if numeric:
                cells.append(_numeric_cell(value))
            elif title == "outcome":
                cells.append(f"<td>{_tag(value)}</td>")
            else:
                kind = ' class="long"' if title in _LONG and value else ""
                cells.append(f"<td{kind}>{html.escape(value)}</td>")
        rows.append(f'<tr data-status="{dataset.entry["status"]}">{"".join(cells)}</tr>')
    ident = f' id="{name}"' if name else ""
    return f"<table{ident}><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _numeric_cell(value: float | str | None) -> str:
    if value is None:
        return '<td class="n" data-v=""></td>'
    if isinstance(value, str):
        return f'<td class="n" data-v="{value.rstrip("%")}">{value}</td>'
    return f'<td class="n" data-v="{value:g}">{value:,.0f}</td>'


def _class(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _tag(status: str) -> str:
    return f'<span class="tag {status}">{status}</span>'


def _footer(summary: Summary) -> str:
    if summary.catalogue is None:
        return "Written by sclong_ds from the ledger and the staged cells."
    catalogue = summary.catalogue
    return (
        f"Written by sclong_ds from the ledger and the corpus {catalogue['hash'][:16]}: "
        f"{catalogue['n_genes']:,} genes, seed {catalogue['options']['seed']}."
    )


def _number(value: float) -> float | None:
    return None if value != value else value


def _whole(value: float) -> str:
    return "none" if value != value else f"{value:,.0f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"
