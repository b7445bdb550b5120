"""Which cells train and which are held out: whole donors, else whole datasets, else single cells.

Cells of one donor (or dataset) resemble each other more than cells of another, so a validation set
that shares donors with the training set overrates a model. Groups are taken in an order that
depends only on the seed and their names, as long as the wanted share is not exceeded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.arguments import DEFAULT_VALIDATION_FRACTION, SPLIT_BY
from sclong_ds.corpus.catalogue import SPLITS
from sclong_ds.files.obs_table import read_obs

SplitBy = Literal["auto", "dataset", "donor", "cell"]
_DONOR_COLUMNS = ("donor", "donor_id")


@dataclass(frozen=True, kw_only=True)
class SplitCells:
    """What the split needs to know of one dataset."""

    dataset_id: str
    """Name of the dataset."""
    donors: tuple[str, ...] | None
    """Names of its donors ('' for unknown); None if its annotation has no donor column."""
    donor: NDArray[np.int32]
    """(cells,) position in `donors`; zeros without donors."""
    kept: NDArray[np.bool_]
    """(cells,) False for cells that are left out of the corpus."""


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """The split of every staged cell."""

    unit: Literal["dataset", "donor", "cell"]
    """What is held out as a whole."""
    codes: tuple[NDArray[np.uint8], ...]
    """Per dataset (cells,) position in SPLITS; meaningless where a cell is not kept."""
    held_out: dict[str, list[str]]
    """Names of the groups of each held-out split; empty lists for single cells."""
    warnings: tuple[str, ...]
    """What the user should know."""


@dataclass(frozen=True)
class SplitOptions:
    """How to split; see `finalize`."""

    seed: int
    validation_fraction: float | None
    test_fraction: float
    split_by: SplitBy
    validation_datasets: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse values outside their range and options that would be ignored."""
        if self.split_by not in SPLIT_BY:
            raise ValueError(f"split_by '{self.split_by}': allowed are {', '.join(SPLIT_BY)}")
        for name, value in (
            ("validation_fraction", self.validation_fraction or 0.0),
            ("test_fraction", self.test_fraction),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"{name} {value}: allowed are 0 to below 1")
        if self.wanted_validation + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction {self.wanted_validation} and test_fraction "
                f"{self.test_fraction} leave no cells to train on"
            )
        if self.validation_datasets and self.split_by not in ("auto", "dataset"):
            raise ValueError(f"validation_datasets does not go with split_by {self.split_by}")
        if self.validation_datasets and self.validation_fraction is not None:
            raise ValueError("give validation_datasets or validation_fraction, not both")

    @property
    def wanted_validation(self) -> float:
        """Share of the cells to validate on."""
        if self.validation_fraction is None:
            return 0.0 if self.validation_datasets else DEFAULT_VALIDATION_FRACTION
        return self.validation_fraction


def read_donors(path: Path, n_cells: int) -> tuple[tuple[str, ...] | None, NDArray[np.int32]]:
    """Read the donor of every cell from a staged annotation table.

    Args:
        path: Annotations of a dataset (`sclong_ds.files.obs_table`); the column `donor` (or
        `donor_id`)
            is used.
        n_cells: Number of staged cells, which the table must match.

    Returns:
        Donor names (None if there is no such column) and (cells,) int32 positions among them.

    Raises:
        ValueError: The table is damaged or has another number of rows.
    """
    try:
        table = read_obs(path, columns=_DONOR_COLUMNS)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; or convert the dataset again") from None
    if len(table) != n_cells:
        raise ValueError(
            f"{path}: {len(table)} rows for {n_cells} cells; convert the dataset again"
        )
    column = next((name for name in _DONOR_COLUMNS if name in table), None)
    if column is None:
        return None, np.zeros(n_cells, np.int32)
    names: dict[str, int] = {}
    codes = [names.setdefault(name.strip(), len(names)) for name in table[column]]
    return tuple(names), np.array(codes, np.int32)


def plan_split(datasets: Sequence[SplitCells], options: SplitOptions) -> SplitPlan:
    """Assign every cell to train, validation or test.

    Args:
        datasets: All datasets of the corpus, in order.
        options: How to split.

    Returns:
        The plan; the same for the same datasets and options.

    Raises:
        ValueError: Unknown dataset ids, no donors where they are asked for, or too few groups.
    """
    n_cells = sum(int(d.kept.sum()) for d in datasets)
    n_needed = 1 + (options.wanted_validation > 0) + (options.test_fraction > 0)
    if options.validation_datasets:
        return _split_named(datasets, options, n_cells)
    if options.split_by in ("auto", "donor") and any(d.donors is not None for d in datasets):
        names, codes = _donor_groups(datasets)
        if options.split_by == "donor" or len(_sizes(names, codes, datasets)) >= n_needed:
            return _split_groups("donor", names, codes, datasets, options)
    if options.split_by == "donor":
        raise ValueError(
            "split_by donor: no dataset has a donor column; name it with donor_column in the "
            "manifest and convert again, or split by dataset"
        )
    names = [d.dataset_id for d in datasets]
    codes = [np.full(len(d.kept), i, np.int32) for i, d in enumerate(datasets)]
    enough = len(_sizes(names, codes, datasets)) >= n_needed
    if options.split_by == "dataset" or (options.split_by == "auto" and enough):
        return _split_groups("dataset", names, codes, datasets, options)
    return _split_single_cells(datasets, options, n_cells)


def _donor_groups(
    datasets: Sequence[SplitCells],
) -> tuple[list[str], list[NDArray[np.int32]]]:
    """Number the donors of all datasets; cells without one form a group with their dataset.

    The same donor name in two datasets is taken for the same person: at worst a group is larger
    than needed, but no donor is on both sides.
    """
    index: dict[str, int] = {}
    codes = []
    for d in datasets:
        names = d.donors or ("",)
        of_donor = [
            index.setdefault(f"donor {name}" if name else f"dataset {d.dataset_id}", len(index))
            for name in names
        ]
        codes.append(np.array(of_donor, np.int32)[d.donor])
    return list(index), codes


def _sizes(
    names: Sequence[str], codes: Sequence[NDArray[np.int32]], datasets: Sequence[SplitCells]
) -> dict[int, int]:
    """Return the kept cells of each group that has any."""
    sizes = np.zeros(len(names), np.int64)
    for code, d in zip(codes, datasets, strict=True):
        sizes += np.bincount(code[d.kept], minlength=len(names))
    return {group: int(size) for group, size in enumerate(sizes) if size}


def _split_groups(
    unit: Literal["dataset", "donor"],
    names: list[str],
    codes: list[NDArray[np.int32]],
    datasets: Sequence[SplitCells],
    options: SplitOptions,
) -> SplitPlan:
    sizes = _sizes(names, codes, datasets)
    n_cells = sum(sizes.values())
    rest = sorted(sizes, key=lambda group: _rank(options.seed, names[group]))
    split_of = np.zeros(len(names), np.uint8)
    held_out: dict[str, list[str]] = {name: [] for name in SPLITS[1:]}
    warnings = []
    for code, fraction in ((1, options.wanted_validation), (2, options.test_fraction)):
        if not fraction:
            continue
        chosen = _pick(rest, sizes, fraction * n_cells)
        rest = [group for group in rest if group not in chosen]
        if not chosen or not rest:
            raise ValueError(
                f"split_by {unit}: {len(sizes)} {unit}(s) with cells are too few for the splits "
                "asked for; add data, or split by cell"
            )
        split_of[list(chosen)] = code
        held_out[SPLITS[code]] = sorted(names[group] for group in chosen)
        share = sum(sizes[group] for group in chosen) / n_cells
        if share > 2 * fraction:
            warnings.append(
                f"{SPLITS[code]} holds {share:.1%} of the cells, {fraction:.1%} were asked for: "
                f"the smallest {unit} is that large"
            )
    return SplitPlan(
        unit=unit,
        codes=tuple(split_of[code] for code in codes),
        held_out=held_out,
        warnings=tuple(warnings),
    )


def _pick(order: Sequence[int], sizes: dict[int, int], budget: float) -> set[int]:
    """Take groups in order while they fit; if none fits, the smallest one."""
    chosen: set[int] = set()
    used = 0
    for group in order:
        if used + sizes[group] <= budget:
            chosen.add(group)
            used += sizes[group]
    return chosen or {min(order, key=lambda group: sizes[group])} if order else chosen


def _split_named(datasets: Sequence[SplitCells], options: SplitOptions, n_cells: int) -> SplitPlan:
    """Hold out the datasets the user named; test datasets are picked from the rest."""
    known = [d.dataset_id for d in datasets]
    unknown = [name for name in options.validation_datasets if name not in known]
    if unknown:
        raise ValueError(
            f"validation dataset '{unknown[0]}': not among the usable datasets {', '.join(known)}"
        )
    kept = {d.dataset_id: int(d.kept.sum()) for d in datasets}
    named = sorted(set(options.validation_datasets))
    rest = [name for name in known if name not in named and kept[name]]
    rest.sort(key=lambda name: _rank(options.seed, name))
    test: list[str] = []
    if options.test_fraction:
        sizes = {i: kept[name] for i, name in enumerate(rest)}
        test = sorted(
            rest[i] for i in _pick(range(len(rest)), sizes, options.test_fraction * n_cells)
        )
    if len(rest) == len(test):
        raise ValueError("validation_datasets and test_fraction leave no dataset to train on")
    code = {**dict.fromkeys(named, 1), **dict.fromkeys(test, 2)}
    return SplitPlan(
        unit="dataset",
        codes=tuple(np.full(len(d.kept), code.get(d.dataset_id, 0), np.uint8) for d in datasets),
        held_out={"validation": named, "test": test},
        warnings=(),
    )


def _split_single_cells(
    datasets: Sequence[SplitCells], options: SplitOptions, n_cells: int
) -> SplitPlan:
    """Draw single cells; donors are then on both sides."""
    fractions = (options.wanted_validation, options.test_fraction)
    wanted = [max(1, int(f * n_cells)) if f else 0 for f in fractions]
    if sum(wanted) >= n_cells:
        raise ValueError(f"{n_cells} cells are too few for the splits asked for")
    random = np.random.Generator(np.random.PCG64(_rank(options.seed, "single cells")))
    drawn = random.permutation(n_cells)[: sum(wanted)]
    of_kept = np.zeros(n_cells, np.uint8)
    of_kept[drawn[: wanted[0]]] = 1
    of_kept[drawn[wanted[0] :]] = 2
    codes, start = [], 0
    for d in datasets:
        code = np.zeros(len(d.kept), np.uint8)
        n_kept = int(d.kept.sum())
        code[d.kept] = of_kept[start : start + n_kept]
        codes.append(code)
        start += n_kept
    warning = (
        "split by single cells: cells of one donor are in training and validation, so validation "
        "overrates the model; add a dataset or a donor column for an honest split"
    )
    return SplitPlan(
        unit="cell",
        codes=tuple(codes),
        held_out={name: [] for name in SPLITS[1:]},
        warnings=(warning,) if sum(wanted) else (),
    )


def _rank(seed: int, name: str) -> int:
    """Return a pseudo-random number of a name, which does not depend on other names."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "big")
