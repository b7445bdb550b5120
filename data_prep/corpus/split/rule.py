"""The rule by which cells are held out, kept with the corpus: growth moves nobody.

    CORPUS/split.json     the rule; the catalogue of the finished corpus has a copy

The side of a group, a donor or a dataset, is a function of its name alone:

    u = first 8 bytes of SHA-256("SALT/NAME") as a big-endian number, divided by 2^64
    validation where u < validation_fraction, test where u >= 1 - test_fraction, else training

NAME is `donor D` of cells with a donor, else `dataset ID`. The salt is drawn once, when the corpus
is first finalized: of some that follow from the seed, the one under which the shares of the cells
come nearest to what was asked for. Datasets that are split by single cells take a hash of the
cell's row in its source. Whatever is added later meets the same rule.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.arguments import DEFAULT_VALIDATION_FRACTION, SPLIT_BY
from sclong_ds.corpus.catalogue import SPLITS, read_catalogue
from sclong_ds.files.sealed_json import CHECKSUM, read_sealed, write_sealed

SplitBy = Literal["auto", "dataset", "donor", "cell"]
RULE_FILE = "split.json"
VERSION = 1
_CURE = "restore it from a copy of the corpus, or delete it to draw the split again"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How to split; see `finalize`."""

    seed: int = 0
    validation_fraction: float | None = None
    test_fraction: float = 0.0
    split_by: SplitBy = "auto"
    validation_datasets: tuple[str, ...] = ()

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


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """What decides the side of every cell, those of datasets to come included."""

    options: SplitOptions
    salt: str = ""
    """Empty until it is drawn."""
    unit: Literal["donor", "dataset", "cell"] = "donor"
    """`donor` falls back to the dataset for cells without one."""
    by_cell: tuple[str, ...] = ()
    """Datasets that are split by single cells for want of groups when they came."""
    pinned: Mapping[str, int] = field(default_factory=dict)
    """Groups whose side the hash does not give: an earlier version chose it. Place in SPLITS."""
    datasets: tuple[str, ...] = ()
    """All datasets that ever were in the corpus, in the order in which they came: of cells that
    repeat each other the one that came first stays."""
    whole_donors: bool = True
    """Whether the donor 1.0 is the donor 1; not in corpora whose split was drawn before that."""

    def side(self, name: str) -> int:
        """Return the place in SPLITS of a group.

        Args:
            name: `donor D` or `dataset ID`.
        """
        if name in self.pinned:
            return self.pinned[name]
        return int(self.sides_of(np.array([unit_hash(self.salt, name)], np.uint64))[0])

    def sides_of_rows(self, dataset_id: str, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return (cells,) the place in SPLITS of single cells.

        Args:
            dataset_id: Their dataset.
            rows: (cells,) their rows in its source.
        """
        return self.sides_of(_mixed(rows, unit_hash(self.salt, f"cells of {dataset_id}")))

    def sides_of(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Return the place in SPLITS of hashes, whatever is pinned."""
        u = hashes / 2.0**64
        options = self.options
        held_out = np.where(u >= 1 - options.test_fraction, 2, 0) if options.test_fraction else 0
        return np.where(u < options.wanted_validation, 1, held_out).astype(np.uint8)

    def as_json(self) -> dict[str, Any]:
        """Return the rule as JSON has it."""
        options = asdict(self.options)
        # Left out where it is not so: the rules of before are written as they were.
        later = {"whole_donors": True} if self.whole_donors else {}
        return later | {
            "version": VERSION,
            "hash": "sha256(salt/name)",
            "options": options | {"validation_datasets": list(self.options.validation_datasets)},
            "salt": self.salt,
            "unit": self.unit,
            "by_cell": list(self.by_cell),
            "pinned": dict(self.pinned),
            "datasets": list(self.datasets),
        }


def unit_hash(salt: str, name: str) -> int:
    """Return the hash of a name, 0 to 2^64 - 1.

    Args:
        salt: Of the corpus.
        name: What is to be split as a whole.
    """
    return int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:8], "big")


def _mixed(rows: NDArray[np.int64], start: int) -> NDArray[np.uint64]:
    """Return a hash (SplitMix64) of each row number, from a start that names the dataset."""
    z = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def read_rule(corpus: Path) -> SplitRule | None:
    """Return the rule of a corpus folder; None where nothing was split yet.

    Of a corpus that was split before there were rules, the rule has no salt, all of its datasets,
    and the groups that it holds out pinned.

    Args:
        corpus: The corpus folder.

    Raises:
        ValueError: It is damaged, or of a later version.
    """
    path = corpus / RULE_FILE
    if path.exists():
        try:
            return rule_of(read_sealed(path))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: damaged ({error}); {_CURE}") from None
    try:
        catalogue = read_catalogue(corpus)
    except FileNotFoundError:
        return None
    if "split_rule" in catalogue:
        return rule_of(catalogue["split_rule"])
    return _earlier(catalogue)


def _earlier(catalogue: Mapping[str, Any]) -> SplitRule | None:
    found = catalogue.get("options", {})
    unit, known = catalogue.get("split_unit"), {f.name for f in fields(SplitOptions)}
    if unit == "cell":
        _log.warning(
            "the corpus was split by single cells by an earlier version, which does not tell which "
            "ones it held out: the split is drawn again, and a resumed run is validated on "
            "cells that it may have trained on"
        )
    if unit not in ("donor", "dataset") or not known <= found.keys():
        return None
    options = {name: found[name] for name in known}
    options["validation_datasets"] = tuple(options["validation_datasets"])
    prefix = "dataset " if unit == "dataset" else ""
    pinned = {
        f"{prefix}{name}": SPLITS.index(split)
        for split, names in catalogue.get("held_out", {}).items()
        for name in names
    }
    datasets = tuple(dataset["dataset_id"] for dataset in catalogue["datasets"])
    return SplitRule(
        options=SplitOptions(**options), unit=unit, pinned=pinned, datasets=datasets,
        whole_donors=False,
    )  # fmt: skip


def write_rule(corpus: Path, rule: Mapping[str, Any]) -> None:
    """Write the rule of a corpus; one that says the same is left alone.

    Args:
        corpus: The corpus folder.
        rule: Of `SplitRule.as_json`.
    """
    path = corpus / RULE_FILE
    try:
        if {k: v for k, v in read_sealed(path).items() if k != CHECKSUM} == dict(rule):
            return
    except (FileNotFoundError, ValueError):
        pass
    write_sealed(path, rule)


def rule_of(tree: Mapping[str, Any]) -> SplitRule:
    """Return the rule of plain values.

    Args:
        tree: Of `SplitRule.as_json`.

    Raises:
        ValueError: It is of another version, or not one.
    """
    if tree["version"] != VERSION:
        raise ValueError(f"version {tree['version']} of a split rule, this program reads {VERSION}")
    options = {f.name: tree["options"][f.name] for f in fields(SplitOptions)}
    options["validation_datasets"] = tuple(options["validation_datasets"])
    unit = tree["unit"]
    if unit not in ("donor", "dataset", "cell"):
        raise ValueError(f"unit {unit!r}")
    return SplitRule(
        options=SplitOptions(**options),
        salt=str(tree["salt"]),
        unit=unit,
        by_cell=tuple(map(str, tree["by_cell"])),
        pinned={str(name): int(side) for name, side in tree["pinned"].items()},
        datasets=tuple(map(str, tree["datasets"])),
        whole_donors=bool(tree.get("whole_donors", False)),
    )


def resolve(given: Mapping[str, Any], before: SplitRule | None) -> SplitRule:
    """Return the rule to go by: what is not given is as before.

    Another seed or unit draws the split again. Other shares keep the order of the hash, so that a
    larger one takes in groups and lets none go.

    Args:
        given: Options of `SplitOptions` by name; None where the command line says nothing.
        before: The rule of the corpus, if it has one.

    Raises:
        ValueError: Options that do not go together.
    """
    wanted = {name: value for name, value in given.items() if value not in (None, ())}
    if before is None:
        return SplitRule(options=SplitOptions(**wanted))
    if "validation_fraction" in wanted:
        wanted.setdefault("validation_datasets", ())
    if "validation_datasets" in wanted:
        wanted.setdefault("validation_fraction", None)
    options = replace(before.options, **wanted)
    same_draw = (options.seed, options.split_by) == (before.options.seed, before.options.split_by)
    if same_draw:
        return replace(before, options=options)
    return SplitRule(options=options)


def in_order_of_arrival(names: Sequence[str], rule: SplitRule) -> list[str]:
    """Return datasets as they came into the corpus, new ones last, by name.

    Args:
        names: Those of this time.
        rule: With those of before.
    """
    place = {name: number for number, name in enumerate(rule.datasets)}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))
