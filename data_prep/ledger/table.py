"""The ledger as a text table, as `status` and `convert` print it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from data_prep.ledger.ledger import STATUSES, LedgerEntry, count_statuses, is_older
from data_prep.ledger.pending import Pending, tasks_to_run
from sclong_ds.page.words import counted


def format_table(entries: Sequence[LedgerEntry], pending: Sequence[Pending] = ()) -> str:
    """Return a text table (dataset, status, cells, genes mapped, reason) and lines of totals.

    Datasets that are not ok come last, where a reader of a long table looks first.

    Args:
        entries: Entries of the ledger.
        pending: Datasets that have none yet.
    """
    rows = [("dataset", "status", "cells", "genes mapped", "reason")]
    rows += [
        (
            entry["dataset_id"],
            entry["status"],
            str(entry["n_cells"]),
            str(entry["n_genes_mapped"]),
            _plain(entry["reason"]),
        )
        for entry in sorted(entries, key=lambda entry: STATUSES.index(entry["status"]))
    ]
    rows += [
        (p.dataset_id, "pending", "", "", f"not converted yet (task {p.task} of {p.tasks})")
        for p in pending
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, status, cells, mapped, reason in rows:
        line = f"{name:<{widths[0]}}  {status:<{widths[1]}}  {cells:>{widths[2]}}"
        lines.append(f"{line}  {mapped:>{widths[3]}}  {reason}".rstrip())
    counts = ", ".join(f"{number} {status}" for status, number in count_statuses(entries).items())
    if pending:
        counts += f", {len(pending)} pending"
        lines.append(f"pending: {tasks_to_run(pending)}")
    usable = [entry for entry in entries if entry["status"] == "ok"]
    n_cells = sum(entry["n_cells"] for entry in usable)
    dropped: Counter[str] = Counter()
    for entry in usable:
        dropped.update(entry["dropped_cells"])
    if dropped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common())
        lines.append(f"cells dropped: {reasons}")
    lines += [
        f"warning: {entry['dataset_id']}: {_plain(warning)}"
        for entry in usable
        for warning in entry["warnings"]
    ]
    totals = f"{counted(len(entries) + len(pending), 'dataset')}: {counts}; {n_cells} cells"
    n_kept = sum(bool(entry["reason"]) and not is_older(entry) for entry in usable)
    if n_kept:
        totals += f"; {n_kept} kept as staged (source not reachable)"
    return "\n".join([*lines, totals])


def _plain(text: str) -> str:
    """Return a text on one line without characters that move the cursor of a terminal."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
