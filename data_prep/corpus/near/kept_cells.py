"""Which staged cells enter a corpus: those that repeat no other, exactly or nearly.

Both answers are kept in the folder in which finalize works, and made again where they are damaged.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.corpus.dedup import Progress, find_duplicates
from data_prep.corpus.near.near_duplicates import (
    PRIMARY,
    SECONDARY,
    UNKNOWN,
    NearDuplicates,
    NearRule,
    find_near_duplicates,
)
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.files.atomic import write_atomic
from sclong_ds.files.npz import read_npz
from sclong_ds.files.obs_table import read_obs

IS_PRIMARY = "is_primary_data"
"""CELLxGENE's column: False where the cell stands in another dataset, too."""
_AGAIN = "it is made again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The answer, dataset by dataset."""

    cells: tuple[NDArray[np.bool_], ...]
    """(cells,) True for those that enter the corpus."""
    near_dropped: tuple[int, ...]
    """Cells left out as near duplicates."""
    near_kept: tuple[int, ...]
    """Cells that enter beside a near duplicate that enters, too."""
    n_left_out: int
    """Pairs of gene lists that were not compared."""

    def warnings(self) -> list[str]:
        """Return what the user should know."""
        found = []
        if dropped := sum(self.near_dropped):
            found.append(
                f"{dropped} cells are left out as near duplicates: the same counts as a cell of "
                "another gene list on the genes of both"
            )
        if kept := sum(self.near_kept):
            found.append(
                f"{kept} cells are near duplicates of each other and stay (the same counts on the "
                "genes of both): is_primary_data does not tell which is the copy; "
                "--near-duplicates drop keeps one of each"
            )
        if self.n_left_out:
            found.append(
                f"{self.n_left_out} pairs of gene lists were not searched for near duplicates: "
                "the lists are too many and too different"
            )
        return found


def kept_cells(
    work: Path,
    staged: Mapping[Path, CellStore],
    measured: NDArray[np.bool_],
    rule: NearRule,
    *,
    progress: Progress | None = None,
) -> Kept:
    """Return which cells enter the corpus.

    Args:
        work: Folder of this finalize.
        staged: Staging folder and cells of each dataset; of exact repeats the first stays.
        measured: (datasets, G) genes that each dataset measures.
        rule: Which near duplicates are left out.
        progress: Called after every chunk.
    """
    stores = [*staged.values()]
    ends = np.cumsum([len(store) for store in stores])[:-1]
    first = [~here for here in np.split(_repeated(work, stores, progress), ends)]
    near = _near(work, staged, first, measured, rule, progress)
    dropped = np.split(near.dropped, ends)
    return Kept(
        cells=tuple(here & ~lost for here, lost in zip(first, dropped, strict=True)),
        near_dropped=tuple(int(lost.sum()) for lost in dropped),
        near_kept=tuple(int(still.sum()) for still in np.split(near.kept, ends)),
        n_left_out=near.n_left_out,
    )


def _repeated(work: Path, stores: list[CellStore], progress: Progress | None) -> NDArray[np.bool_]:
    """Return (cells,) which cells repeat an earlier one."""
    path = work / "repeated.npz"
    try:
        return np.asarray(read_npz(path, cure=_AGAIN)["repeated"], bool)
    except (OSError, ValueError, KeyError):
        repeated = find_duplicates(stores, work / "digests", progress=progress)
    found = np.concatenate(repeated)
    _write(path, {"repeated": found})
    return found


def _near(
    work: Path,
    staged: Mapping[Path, CellStore],
    first: list[NDArray[np.bool_]],
    measured: NDArray[np.bool_],
    rule: NearRule,
    progress: Progress | None,
) -> NearDuplicates:
    path = work / "near.npz"
    try:
        kept = read_npz(path, cure=_AGAIN)
        return NearDuplicates(
            dropped=np.asarray(kept["dropped"], bool),
            kept=np.asarray(kept["kept"], bool),
            n_left_out=int(kept["n_left_out"]),
        )
    except (OSError, ValueError, KeyError):
        near = find_near_duplicates(
            [*staged.values()],
            first,
            measured,
            [read_primary(folder, len(store)) for folder, store in staged.items()],
            work / "near",
            rule=rule,
            progress=progress,
        )
    document = {"dropped": near.dropped, "kept": near.kept}
    _write(path, {**document, "n_left_out": np.array(near.n_left_out)})
    return near


def read_primary(folder: Path, n_cells: int) -> NDArray[np.uint8]:
    """Return (cells,) what a staged dataset says of `is_primary_data`: PRIMARY, SECONDARY, UNKNOWN.

    Args:
        folder: Staging folder.
        n_cells: Its cells.

    Raises:
        ValueError: The annotations are damaged or of another number of cells.
    """
    path = folder / "obs.parquet"
    try:
        table = read_obs(path, columns=(IS_PRIMARY,))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; or convert the dataset again") from None
    if IS_PRIMARY not in table:
        return np.full(n_cells, UNKNOWN, np.uint8)
    if len(table) != n_cells:
        raise ValueError(
            f"{path}: {len(table)} rows for {n_cells} cells; convert the dataset again"
        )
    codes = {"true": PRIMARY, "1": PRIMARY, "false": SECONDARY, "0": SECONDARY}
    texts, places = np.unique(table[IS_PRIMARY].to_numpy(object), return_inverse=True)
    return np.array([codes.get(text.strip().lower(), UNKNOWN) for text in texts], np.uint8)[places]


def _write(path: Path, document: Mapping[str, NDArray[np.generic]]) -> None:
    content = io.BytesIO()
    np.savez(content, **document)  # type: ignore[arg-type]
    write_atomic(path, content.getvalue())
