"""Which cells train and which are held out: whole donors, else whole datasets, else single cells.

Cells of one donor (or dataset) resemble each other more than cells of another, so a validation set
that shares donors with the training set overrates a model. The side of a group follows from its
name by a rule that stays with the corpus (`data_prep.corpus.split.rule`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.annotations.words import plain_number
from data_prep.corpus.split.rule import (
    SplitOptions,
    SplitRule,
    in_order_of_arrival,
    rule_of,
    unit_hash,
)
from sclong_ds.corpus.catalogue import SPLITS
from sclong_ds.files.obs_table import obs_length, obs_names, read_coded

Unit = Literal["donor", "dataset", "cell"]
_DONOR_COLUMNS = ("donor", "donor_id")
_FEWEST_SALTS, _MOST_SALTS, _HASHES = 64, 4096, 50_000
"""Salts that are tried, and about how many hashes may be taken for them."""
_NEAR = 0.01
"""Shares that differ by less than this part of what was asked for are near enough."""
_MOST_SALTED_CELLS = 100_000
"""Of more single cells the share is right whatever the salt."""


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
    rows: NDArray[np.int64]
    """(cells,) their rows in the source."""


@dataclass(frozen=True, kw_only=True)
class SplitShare:
    """How near a split comes to what was asked for."""

    wanted: float
    """Share of the cells that was asked for; of named datasets 0."""
    cells: float
    """Share of the cells that it holds."""
    groups: float
    """Share of the donors, datasets or single cells."""


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """The split of every staged cell."""

    unit: Unit
    """What is held out as a whole."""
    codes: tuple[NDArray[np.uint8], ...]
    """Per dataset (cells,) position in SPLITS; meaningless where a cell is not kept."""
    held_out: dict[str, list[str]]
    """Names of the groups of each held-out split; empty lists for single cells."""
    shares: dict[str, SplitShare]
    """Of each held-out split."""
    warnings: tuple[str, ...]
    """What the user should know."""
    rule: SplitRule
    """With which the next datasets are split."""

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON has it, without the codes."""
        shares = {name: asdict(share) for name, share in self.shares.items()}
        return {
            "unit": self.unit, "held_out": self.held_out, "shares": shares,
            "warnings": list(self.warnings), "rule": self.rule.as_json(),
        }  # fmt: skip

    @classmethod
    def of(cls, tree: Mapping[str, Any], codes: Sequence[NDArray[np.uint8]]) -> SplitPlan:
        """Return the plan of plain values.

        Args:
            tree: Of `as_json`.
            codes: Per dataset (cells,) position in SPLITS.
        """
        return cls(
            unit=tree["unit"],
            codes=tuple(codes),
            held_out=tree["held_out"],
            shares={name: SplitShare(**share) for name, share in tree["shares"].items()},
            warnings=tuple(tree["warnings"]),
            rule=rule_of(tree["rule"]),
        )


def read_donors(
    path: Path, n_cells: int, *, whole: bool = True
) -> tuple[tuple[str, ...] | None, NDArray[np.int32]]:
    """Read the donor of every cell from a staged annotation table.

    Args:
        path: Annotations of a dataset (`sclong_ds.files.obs_table`); the column `donor`, or
            `donor_id`, is used.
        n_cells: Number of staged cells, which the table must match.
        whole: Read 1.0 as 1, see `SplitRule.whole_donors`.

    Returns:
        Donor names (None if there is no such column) and (cells,) int32 positions among them.

    Raises:
        ValueError: The table is damaged or has another number of rows.
    """
    try:
        n_rows, present = obs_length(path), obs_names(path)
        column = next((name for name in _DONOR_COLUMNS if name in present), None)
        codes, values = read_coded(path, column) if column else (np.zeros(n_rows, np.int64), [])
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; or convert the dataset again") from None
    if n_rows != n_cells:
        raise ValueError(f"{path}: {n_rows} rows for {n_cells} cells; convert the dataset again")
    if column is None:
        return None, codes.astype(np.int32)
    names: dict[str, int] = {}
    read = [plain_number(value.strip()) if whole else value.strip() for value in values]
    places = [names.setdefault(name, len(names)) for name in read]
    return tuple(names), np.array(places, np.int32)[codes]


def plan_split(datasets: Sequence[SplitCells], rule: SplitRule) -> SplitPlan:
    """Assign every cell to train, validation or test.

    Args:
        datasets: All datasets of the corpus, in order.
        rule: How to split; one without a salt gets one.

    Returns:
        The plan; the same for the same datasets and rule.

    Raises:
        ValueError: Unknown dataset ids, no donors where they are asked for, or too few groups.
    """
    _check_named(datasets, rule.options)
    if not rule.salt:
        rule = _drawn(datasets, rule)
    known = in_order_of_arrival([d.dataset_id for d in datasets], rule)
    came = [name for name in known if name not in {*rule.datasets}]
    rule = replace(rule, datasets=(*rule.datasets, *came))
    return planned_by(datasets, rule)


def _check_named(datasets: Sequence[SplitCells], options: SplitOptions) -> None:
    known = [d.dataset_id for d in datasets]
    unknown = [name for name in options.validation_datasets if name not in known]
    if unknown:
        raise ValueError(
            f"validation dataset '{unknown[0]}': not among the usable datasets {', '.join(known)}"
        )
    rest = [d for d in datasets if d.dataset_id not in options.validation_datasets]
    if options.validation_datasets and not any(d.kept.any() for d in rest):
        raise ValueError("validation_datasets leave no dataset to train on")


def _drawn(datasets: Sequence[SplitCells], rule: SplitRule) -> SplitRule:
    """Return the rule with unit and salt, for the first datasets of a corpus."""
    options = rule.options
    n_needed = 1 + (options.wanted_validation > 0) + (options.test_fraction > 0)
    if rule.datasets:
        return _continued(datasets, rule)
    if options.split_by == "donor" and all(d.donors is None for d in datasets):
        raise ValueError(
            "split_by donor: no dataset has a donor column; name it with donor_column in the "
            "manifest and convert again, or split by dataset"
        )
    units: tuple[Unit, ...] = ("donor", "dataset")
    if options.split_by in units:
        units = (options.split_by,)
    if options.validation_datasets:
        units = ("dataset",)
    for unit in units if options.split_by != "cell" else ():
        found = replace(rule, unit=unit)
        sizes = _sizes(datasets, found)
        if len(sizes) >= n_needed:
            return _with_salt(found, sizes)
        if options.split_by == unit or options.validation_datasets:
            raise ValueError(
                f"split_by {unit}: {len(sizes)} {unit}(s) with cells are too few for the splits "
                "asked for; add data, or split by cell"
            )
    n_cells = sum(int(d.kept.sum()) for d in datasets)
    if n_cells < n_needed:
        raise ValueError(f"{n_cells} cells are too few for the splits asked for")
    if options.split_by == "cell":
        found = replace(rule, unit="cell")
    else:
        found = replace(rule, by_cell=tuple(d.dataset_id for d in datasets))
    return _with_cell_salt(found, datasets, n_cells)


def _continued(datasets: Sequence[SplitCells], rule: SplitRule) -> SplitRule:
    """Return the rule of a corpus that was split before there were rules: its groups stay."""
    known = [d for d in datasets if d.dataset_id in rule.datasets]
    unit = rule.unit
    if rule.options.split_by == "auto" and all(d.donors is None for d in known):
        # Its groups have the same names either way; donors of later datasets count.
        unit = "dataset" if rule.options.validation_datasets else "donor"
    found = replace(rule, unit=unit, salt=f"{rule.options.seed}/0", pinned={})
    sides = {name: rule.pinned.get(name, 0) for d in known for name in _names(d, found)}
    named = {f"dataset {name}" for name in rule.options.validation_datasets}
    pinned = {
        name: side
        for name, side in sorted(sides.items())
        if name not in named and found.side(name) != side
    }
    return replace(found, pinned=pinned)


def _with_salt(rule: SplitRule, sizes: dict[str, int]) -> SplitRule:
    """Return the rule under which the shares of the cells come nearest to what was asked for."""
    named = {f"dataset {name}" for name in rule.options.validation_datasets}
    names = [name for name in sizes if name not in named]
    cells = np.array([sizes[name] for name in names])

    def score(found: SplitRule) -> float:
        hashes = np.array([unit_hash(found.salt, name) for name in names], np.uint64)
        sides = found.sides_of(hashes)
        return _distance(np.bincount(sides, weights=cells, minlength=len(SPLITS)), rule.options)

    found = _best(rule, score, n_hashes=len(names))
    if found is not None:
        return found
    # Shares so small that no group is likely to have one: the smallest are held out.
    found = replace(rule, salt=f"{rule.options.seed}/0")
    by_size = sorted(names, key=lambda name: (sizes[name], name))
    wanted = (rule.options.wanted_validation, rule.options.test_fraction)
    codes = [code for code, share in enumerate(wanted, 1) if share]
    sides = dict.fromkeys(names, 0) | dict(zip(by_size, codes, strict=False))
    return replace(found, pinned={n: side for n, side in sides.items() if found.side(n) != side})


def _with_cell_salt(rule: SplitRule, datasets: Sequence[SplitCells], n_cells: int) -> SplitRule:
    """The same for single cells."""

    def score(found: SplitRule) -> float:
        sides = [found.sides_of_rows(d.dataset_id, d.rows)[d.kept] for d in datasets]
        return _distance(np.bincount(np.concatenate(sides), minlength=len(SPLITS)), rule.options)

    found = None
    if n_cells <= _MOST_SALTED_CELLS:
        found = _best(rule, score, n_hashes=n_cells)
        if found is None:
            raise ValueError(f"{n_cells} cells are too few for the splits asked for")
    return found or replace(rule, salt=f"{rule.options.seed}/0")


def _best(
    rule: SplitRule, score: Callable[[SplitRule], float], *, n_hashes: int
) -> SplitRule | None:
    """Return the rule with the best of the salts that follow from the seed, None if none will do.

    Args:
        rule: The rule.
        score: Distance of a rule with a salt from what was asked for; infinite where it will not
            do.
        n_hashes: What one score costs.
    """
    n_salts = min(max(_HASHES // n_hashes, _FEWEST_SALTS), _MOST_SALTS)
    best, lowest = None, np.inf
    for number in range(n_salts):
        found = replace(rule, salt=f"{rule.options.seed}/{number}")
        distance = score(found)
        if distance < lowest:
            best, lowest = found, distance
        if lowest < _NEAR:
            break
    return best


def _distance(cells: NDArray[np.number], options: SplitOptions) -> float:
    """Return how far the cells of the three splits are from what was asked for."""
    total, distance = float(cells.sum()), 0.0
    if not cells[0]:
        return np.inf
    for n_cells, wanted in zip(
        cells[1:].tolist(), (options.wanted_validation, options.test_fraction), strict=True
    ):
        if wanted:
            distance += abs(n_cells / total - wanted) / wanted if n_cells else np.inf
    return distance


def _names(d: SplitCells, rule: SplitRule) -> list[str]:
    """Return the groups of a dataset; of donors that are unknown it is the dataset itself.

    The same donor name in two datasets is taken for the same person: at worst a group is larger
    than needed, but no donor is on both sides.
    """
    donors = (d.donors or ("",)) if rule.unit == "donor" else ("",) * len(d.donors or ("",))
    return [f"donor {name}" if name else f"dataset {d.dataset_id}" for name in donors]


def _sizes(datasets: Sequence[SplitCells], rule: SplitRule) -> dict[str, int]:
    """Return the kept cells of each group that has any."""
    found: dict[str, int] = {}
    for d in datasets:
        names = _names(d, rule)
        here = np.bincount(d.donor[d.kept], minlength=len(names))
        for name, size in zip(names, here, strict=True):
            found[name] = found.get(name, 0) + int(size)
    return {name: size for name, size in found.items() if size}


def planned_by(datasets: Sequence[SplitCells], rule: SplitRule) -> SplitPlan:
    """Return the plan by a rule that is complete, also of some of its datasets.

    Args:
        datasets: Some datasets.
        rule: With a salt.
    """
    codes = []
    groups: dict[str, int] = {}
    """Side of each group with cells."""
    single = np.zeros(len(SPLITS), np.int64)
    for d in datasets:
        if d.dataset_id in rule.options.validation_datasets:
            codes.append(np.ones(len(d.kept), np.uint8))
            groups[f"dataset {d.dataset_id}"] = 1
        elif rule.unit == "cell" or d.dataset_id in rule.by_cell:
            codes.append(rule.sides_of_rows(d.dataset_id, d.rows))
            single += _count(codes[-1][d.kept])
        else:
            names = _names(d, rule)
            sides = np.array([rule.side(name) for name in names], np.uint8)
            codes.append(sides[d.donor])
            groups |= {names[n]: int(sides[n]) for n in np.unique(d.donor[d.kept]).tolist()}
    unit = _label(datasets, rule, by_cell=bool(single.any()))
    cells = sum((_count(c[d.kept]) for c, d in zip(codes, datasets, strict=True)), 0 * single)
    shares = _shares(rule.options, cells, single + _count([*groups.values()]))
    return SplitPlan(
        unit=unit,
        codes=tuple(codes),
        held_out={
            split: sorted(
                name.removeprefix("dataset ") if unit == "dataset" else name
                for name, side in groups.items()
                if side == code
            )
            for code, split in enumerate(SPLITS[1:], 1)
        },
        shares=shares,
        warnings=_warnings(shares, unit, by_cell=bool(single[1:].any())),
        rule=rule,
    )


def _count(sides: NDArray[np.uint8] | Sequence[int]) -> NDArray[np.int64]:
    return np.bincount(np.asarray(sides, np.int64), minlength=len(SPLITS))


def _label(datasets: Sequence[SplitCells], rule: SplitRule, *, by_cell: bool) -> Unit:
    """Return what the corpus says is held out as a whole."""
    if by_cell:
        return "cell"
    grouped = rule.unit == "dataset" or all(d.donors is None for d in datasets)
    return "dataset" if grouped else "donor"


def _shares(
    options: SplitOptions, cells: NDArray[np.int64], groups: NDArray[np.int64]
) -> dict[str, SplitShare]:
    wanted = (options.wanted_validation, options.test_fraction)
    return {
        name: SplitShare(
            wanted=share,
            cells=float(cells[code] / max(cells.sum(), 1)),
            groups=float(groups[code] / max(groups.sum(), 1)),
        )
        for code, (name, share) in enumerate(zip(SPLITS[1:], wanted, strict=True), 1)
    }


def _warnings(shares: Mapping[str, SplitShare], unit: Unit, *, by_cell: bool) -> tuple[str, ...]:
    found = [
        f"{name} holds {share.cells:.1%} of the cells and {share.groups:.1%} of the {unit}s, "
        f"{share.wanted:.1%} of the cells were asked for: the hash of the names takes whole "
        f"{unit}s; more of them bring it nearer, another --seed draws all again"
        for name, share in shares.items()
        if share.wanted and not share.wanted / 2 <= share.cells <= 2 * share.wanted
    ]
    if by_cell:
        found.append(
            "split by single cells: cells of one donor are in training and validation, so "
            "validation overrates the model; add a dataset or a donor column for an honest split"
        )
    return tuple(found)
