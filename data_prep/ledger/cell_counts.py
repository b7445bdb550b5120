"""The words for numbers of cells, one meaning each, wherever a command counts them.

- **read**: cells that the files hold, of all datasets that could be read.
- **dropped**: cells of the datasets used that are left out, each counted once, by the first reason.
- **in datasets left out**: cells read of datasets that are excluded or failed.
- **kept**: the rest. Those of a finished corpus are in it; before finalize repeats are among them,
  and datasets that came after it are kept and not in the corpus yet.

So read = kept + dropped + in datasets left out. `manifest` counts what convert will read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.ledger.ledger import LedgerEntry
from sclong_ds.page.words import counted

REPEATS, NEAR = "repeats another cell", "near duplicate of another cell"
"""Reasons that only finalize can tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellCounts:
    """The cells of a corpus folder, by what became of them."""

    read: int
    kept: int
    dropped: Mapping[str, int]
    """By reason, most first."""
    in_datasets_left_out: int

    @property
    def n_dropped(self) -> int:
        """Cells dropped for any reason."""
        return sum(self.dropped.values())

    def as_json(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return asdict(self)

    def text(self) -> str:
        """Return the counts as one line."""
        reasons = ", ".join(f"{reason}: {number:,}" for reason, number in self.dropped.items())
        return (
            f"{counted(self.read, 'cell')} read = {self.kept:,} kept + {self.n_dropped:,} dropped"
            f"{f' ({reasons})' if reasons else ''} + {self.in_datasets_left_out:,} in datasets "
            "left out"
        )


def cell_counts(
    ledger: Iterable[LedgerEntry], catalogue: Mapping[str, Any] | None = None
) -> CellCounts:
    """Count the cells of a corpus folder.

    Args:
        ledger: Its entries.
        catalogue: Of the finished corpus, if there is one.
    """
    infos = {d["dataset_id"]: d for d in catalogue["datasets"]} if catalogue else {}
    read = kept = left_out = 0
    dropped: Counter[str] = Counter()
    for entry in ledger:
        read += entry["n_cells_input"]
        if entry["status"] != "ok":
            left_out += entry["n_cells_input"]
            continue
        dropped.update(entry["dropped_cells"])
        info = infos.get(entry["dataset_id"])
        if info and not _is_of(info, entry):
            info = None
        near = (info.get("near_dropped") or 0) if info else 0
        dropped[NEAR] += near
        dropped[REPEATS] += info["duplicates_dropped"] - near if info else 0
        kept += info["n_cells"] if info else entry["n_cells"]
    found = {reason: number for reason, number in dropped.most_common() if number}
    return CellCounts(read=read, kept=kept, dropped=found, in_datasets_left_out=left_out)


def _is_of(info: Mapping[str, Any], entry: LedgerEntry) -> bool:
    """Tell whether a corpus holds what is staged of a dataset now, not what was before."""
    hashes = {info.get("source_hash"), entry.get("source_hash")} - {None}
    n_cells = info["n_cells"] + info["duplicates_dropped"]
    return bool(n_cells == entry["n_cells"]) and len(hashes) < 2
