"""The stages in which the products of a corpus are made, each in units that processes share.

    check        staged files, compared with their checksums: some datasets a unit
    annotations  tables of annotations, copied and coded: some datasets a unit
    duplicates   digests of cells, by run of chunks
    repeated     cells whose digest an earlier cell has, by bucket of the digest
    near-...     cells that nearly repeat others, in datasets with other gene lists: by run of
                 chunks, then by bucket (`near.near_duplicates`), then one unit of numbers alone
    plan         split and layout of the store: one unit
    scatter      cells by unit of the store, by run of chunks
    write        shards, their checksums, statistics: some shards a unit
    join         the store of all cells: one unit
    columns      annotations in the order of the cells, by column
    recheck      staged files: still those of `check`
    seal         what is left, checksums and catalogue: one unit

Units follow from what is staged, not from the number of processes (`data_prep.passes.crew`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.annotations.columns import Annotations, ColumnPlan, column_of, plan_columns
from data_prep.corpus.gene_statistics import GeneSums, write_sums
from data_prep.corpus.growth.digests import DigestUnit, keep_piece, plan_units, read_kept
from data_prep.corpus.growth.earlier import EarlierParts
from data_prep.corpus.inputs import Inputs
from data_prep.corpus.near.gene_sets import GeneSets, gene_sets
from data_prep.corpus.near.kept_cells import NEAR_FOLDER, NEAR_STAGES, read_near, run_near
from data_prep.corpus.near.near_duplicates import NearRule, NearSearch
from data_prep.corpus.split.plan import SplitCells, SplitPlan, plan_split, planned_by, read_donors
from data_prep.corpus.split.rule import SplitRule
from data_prep.corpus.staged import Staged, file_states
from data_prep.ledger.ledger import LedgerEntry, check_staged
from data_prep.passes.buckets import BucketRuns, bounds_path, plan_runs, write_run
from data_prep.passes.crew import Crew, Made
from data_prep.passes.dedup import CELLS_PER_BUCKET, digest_run, repeated_in
from data_prep.passes.permute import (
    Layout,
    StagedCells,
    append_no_cells,
    plan_layout,
    scatter_run,
    write_unit,
)
from data_prep.source.measured import read_measured
from sclong_ds.annotations.columns import column_name, write_column
from sclong_ds.corpus.byte_code import PackedCells, decode, digest_cells
from sclong_ds.corpus.catalogue import SPLITS
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CHUNK_ENTRIES, CHUNKS_PER_SHARD, CellWriter
from sclong_ds.files.atomic import file_sha256, remove_partials_of, write_atomic
from sclong_ds.files.npz import npz_bytes, read_npz
from sclong_ds.files.obs_table import write_coded

MOST_BYTES, LEAST_BYTES, USUAL_UNITS = 2**28, 2**25, 64
"""Encoded cells of a run: a share of all, within limits."""
CELLS_OF_TABLES = 2**20
"""Cells whose annotations are one unit."""
KEPT_DIGESTS = "digests-kept"
"""Folder inside the work folder with the digests that were taken, where a part is added."""
LEFT_OUT = 255
"""In place of a split: the cell repeats another."""
STAGES = (
    "check", "annotations", "duplicates", "repeated", *NEAR_STAGES, "plan", "scatter", "write",
    "join", "columns", "recheck", "seal", "publish",
)  # fmt: skip
_CURE = "run finalize again"
Codec = Literal["zstd", "none"]


class Build:
    """What every process of a finalize knows; its stages run in the order of STAGES."""

    def __init__(
        self,
        crew: Crew,
        *,
        inputs: Inputs,
        staged: Sequence[Staged],
        rule: SplitRule,
        codec: Codec,
        near: NearRule,
        earlier: EarlierParts | None = None,
    ) -> None:
        """Describe the work.

        Args:
            crew: With the work folder.
            inputs: What the corpus is made of.
            staged: The datasets, in the order in which they came.
            rule: How to split.
            codec: Of the cells.
            near: Which near duplicates to leave out.
            earlier: Parts that are there; the first datasets are theirs, and only the cells of the
                others are written.
        """
        self.crew, self.work, self.inputs, self.staged = crew, crew.work, inputs, staged
        self.rule, self.codec, self.near, self.earlier = rule, codec, near, earlier
        self.n_earlier = 0 if earlier is None else earlier.n_datasets
        """Datasets of earlier parts."""
        self.new = staged[self.n_earlier :]
        """The datasets whose cells are written."""
        self.sizes = [len(s.cells) for s in staged]
        self.firsts = np.cumsum([0, *self.sizes])
        self.unit_bytes = _unit_bytes(self.new)

    def make_products(self) -> None:
        """Run the stages up to `recheck`."""
        for name in (
            "coded", "obs", "obs-earlier", "digests", KEPT_DIGESTS, "repeated", "scattered",
            "units", "columns-made",
        ):  # fmt: skip
            (self.work / name).mkdir(exist_ok=True)
        checked = self._in_groups([_staged_bytes(s.ledger) for s in self.staged], self.unit_bytes)
        coded = self._in_groups(self.sizes, CELLS_OF_TABLES)
        sizes = [[sum(self.sizes[i] for i in unit) for unit in units] for units in (checked, coded)]
        runs = [sum(self._n_cells(chunk) for chunk in run) for run in self._runs]
        digests = [unit.n_cells for unit in self._digest_units]
        buckets = [0] * self._n_buckets
        run = self.crew.run
        run("check", sizes[0], lambda unit: [self._check(i) for i in checked[unit]])
        run("annotations", sizes[1], lambda unit: self._code_all(coded[unit]))
        run("duplicates", digests, self._digest)
        run("repeated", buckets, self._repeated)
        tables, stores = [self._coded(s) for s in self.staged], [s.cells for s in self.staged]
        run_near(self.crew, self.work / "near.npz", tables, stores, self._near_search, self.near)
        run("plan", [0], self._plan)
        run("scatter", runs, self._scatter)
        run("write", self.layout.n_cells.tolist(), self._write)
        run("join", [0], self._join)
        run("columns", [len(self.cells)] * len(self.columns), self._column)
        states = [state for unit in self.crew.results("check") for state in unit]

        def recheck(place: int) -> None:
            self._recheck(place, states[place])

        run("recheck", sizes[0], lambda unit: _each(recheck, checked[unit]))

    def _in_groups(self, sizes: Sequence[int], most: int) -> list[list[int]]:
        """Return the places of datasets in groups of about a size, larger ones alone."""
        groups: list[list[int]] = []
        room = 0
        for place, size in enumerate(sizes):
            if room <= 0 or (size > room and size > most // 2):
                groups.append([])
                room = most
            groups[-1].append(place)
            room -= size
        return groups

    @cached_property
    def _runs(self) -> list[list[tuple[int, int]]]:
        """Chunks of the cells that are written, by place among the new datasets."""
        return plan_runs([s.cells for s in self.new], run_bytes=self.unit_bytes)

    @cached_property
    def _digest_units(self) -> list[DigestUnit]:
        before = () if self.earlier is None else self.earlier.parts
        parts = [(part.first, part.stop, part.digests) for part in before]
        parts.append((self.n_earlier, len(self.staged), None))
        stores = [s.cells for s in self.staged]
        return plan_units(parts, stores, self.firsts, run_bytes=self.unit_bytes)

    @property
    def _n_buckets(self) -> int:
        return max(1, -(-sum(self.sizes) // CELLS_PER_BUCKET))

    def _n_cells(self, chunk: tuple[int, int]) -> int:
        rows = self.new[chunk[0]].cells.chunk_rows
        return int(rows[chunk[1] + 1] - rows[chunk[1]])

    def _check(self, place: int) -> dict[str, list[int]]:
        """Compare the staged files of a dataset; return what tells whether they change."""
        s, shards = self.staged[place], bool(self._all_cells_read[place])
        state = file_states(s)
        check_staged(self.inputs.corpus, s.ledger, shards=shards)
        return state

    def _recheck(self, place: int, state: dict[str, list[int]]) -> None:
        """Refuse staged files that are no longer those that were used."""
        s, shards = self.staged[place], bool(self._all_cells_read[place])
        if file_states(s) != state:
            check_staged(self.inputs.corpus, s.ledger, shards=shards)

    @cached_property
    def _all_cells_read(self) -> NDArray[np.bool_]:
        """(datasets,) False where digests are kept and no near duplicates are looked for."""
        read = np.ones(len(self.staged), bool)
        for part in () if self.earlier is None else self.earlier.parts:
            read[part.first : part.stop] = part.digests is None
        if not read.all():
            read |= self._sets.takes[:, self._sets.of_dataset].any(axis=0)
        return read

    def _code_all(self, places: Sequence[int]) -> Made:
        return self.crew.made_files(*(path for place in places for path in self._code(place)))

    def _code(self, place: int) -> tuple[Path, Path]:
        """Copy the annotations of a dataset, and keep them by the codes of their values."""
        s = self.staged[place]
        # Those of earlier parts are in them.
        folder = self.work / ("obs" if place >= self.n_earlier else "obs-earlier")
        copy = folder / f"{s.dataset_id}.parquet"
        shutil.copyfile(s.folder / "obs.parquet", copy)
        if file_sha256(copy) != s.ledger["files"]["obs.parquet"][1]:
            raise ValueError(f"{s.folder / 'obs.parquet'}: changed while finalize was at work")
        try:
            write_coded(self._coded(s), copy, n_cells=len(s.cells), without=("barcode",))
        except ValueError as error:
            raise ValueError(f"{error}; or convert the dataset again") from None
        return copy, self._coded(s)

    def _coded(self, s: Staged) -> Path:
        return self.work / "coded" / f"{s.dataset_id}.npz"

    def _digest(self, number: int) -> Made:
        """Write the digests of a run of cells, by bucket."""
        unit = self._digest_units[number]
        kept = []
        if unit.kept is not None:
            digests = read_kept(unit)
        else:
            digests = np.concatenate(
                [digest_cells(self.staged[i].cells.read_packed(chunk)) for i, chunk in unit.chunks]
            )
            if self.earlier is not None:
                kept.append(keep_piece(self.work / KEPT_DIGESTS, unit, digests))
        bounds, records = digest_run(digests, unit.first, n_buckets=self._n_buckets)
        folder = self.work / "digests"
        write_run(folder, number, bounds, [records])
        return self.crew.made_files(bounds_path(folder, number), *kept)

    def _repeated(self, bucket: int) -> Made:
        found, path = repeated_in(self._digests, bucket), self._repeated_path(bucket)
        write_atomic(path, npz_bytes(cells=found))
        return self.crew.made_files(path)

    @cached_property
    def _digests(self) -> BucketRuns:
        return self._complete("digests", self._n_buckets, n_runs=len(self._digest_units))

    def _complete(self, name: str, n_buckets: int, *, n_runs: int) -> BucketRuns:
        """Return what a stage has written of all runs."""
        return BucketRuns.complete(self.work / name, n_buckets=n_buckets, n_runs=n_runs)

    def _repeated_path(self, bucket: int) -> Path:
        return self.work / "repeated" / f"{bucket:06d}.npz"

    def _all_repeated(self) -> NDArray[np.bool_]:
        """Return (cells,) True for the cells of all datasets that repeat an earlier one exactly."""
        repeated = np.zeros(int(self.firsts[-1]), bool)
        for bucket in range(self._n_buckets):
            repeated[read_npz(self._repeated_path(bucket), cure=_CURE)["cells"]] = True
        return repeated

    @cached_property
    def measured(self) -> NDArray[np.bool_]:
        """(datasets, G) genes that each dataset measures."""
        n_genes = len(self.inputs.genes)
        return np.stack([read_measured(s.folder, n_genes) for s in self.staged])

    @cached_property
    def _sets(self) -> GeneSets:
        return gene_sets(self.measured)

    @cached_property
    def _near_search(self) -> NearSearch:
        """The search for near duplicates; after the stage `repeated`."""
        stores, folder = [s.cells for s in self.staged], self.work / NEAR_FOLDER
        kept, run_bytes = ~self._all_repeated(), _unit_bytes(self.staged)
        return NearSearch(stores, kept, self._sets, folder, run_bytes=run_bytes)

    def _plan(self, unit: int) -> Made:
        """Write the split of each cell and the layout; return the rest of the split's plan."""
        repeated = self._all_repeated() | read_near(self.work / "near.npz")
        overdue = 0
        if self.earlier is not None:
            # Earlier parts hold what they hold.
            before = int(self.firsts[self.n_earlier])
            gone = ~np.concatenate(self.earlier.kept())
            overdue = int((repeated[:before] & ~gone).sum())
            repeated[:before] = gone
        groups, n_donors = [], []
        for s, here in zip(self.staged, self._by_dataset(~repeated), strict=True):
            donors, donor = read_donors(self._coded(s), len(s.cells), whole=self.rule.whole_donors)
            n_donors.append(len({*(donors or ())} - {""}))
            rows = s.cells.table("source_row")
            groups.append(
                SplitCells(
                    dataset_id=s.dataset_id, donors=donors, donor=donor, kept=here, rows=rows
                )
            )
        plan = plan_split(groups, self.rule)
        codes = np.where(repeated, np.uint8(LEFT_OUT), np.concatenate(plan.codes))
        layout = plan_layout(
            self._cells_of(codes)[self.n_earlier :],
            seed=self.rule.options.seed,
            chunk_entries=CHUNK_ENTRIES,
            unit_chunks=self._unit_shards * CHUNKS_PER_SHARD,
        )
        path = self.work / "plan.npz"
        write_atomic(path, npz_bytes(codes=codes, **asdict(layout)))
        new = plan if self.earlier is None else planned_by(groups[self.n_earlier :], plan.rule)
        result = {
            "all": plan.as_json(), "new": new.as_json(), "n_donors": n_donors,
            "overdue": overdue,
        }  # fmt: skip
        return self.crew.made_files(path, result=result)

    @property
    def _unit_shards(self) -> int:
        return max(1, self.unit_bytes // (2 * CHUNK_ENTRIES * CHUNKS_PER_SHARD))

    def _by_dataset(self, cells: NDArray[Any]) -> list[NDArray[Any]]:
        return np.split(cells, self.firsts[1:-1])

    def _cells_of(self, codes: NDArray[np.uint8]) -> list[StagedCells]:
        return [
            StagedCells(dataset_id=s.dataset_id, cells=s.cells, kept=here != LEFT_OUT, split=here)
            for s, here in zip(self.staged, self._by_dataset(codes), strict=True)
        ]

    @cached_property
    def _planned(self) -> dict[str, NDArray[Any]]:
        return read_npz(self.work / "plan.npz", cure=_CURE)

    @cached_property
    def layout(self) -> Layout:
        """Where the units of the store begin; after the stage `plan`."""
        names = ("split", "key", "n_cells")
        return Layout(**{name: self._planned[name] for name in names})

    @cached_property
    def codes(self) -> list[NDArray[np.uint8]]:
        """Per dataset (cells,) place in SPLITS, or LEFT_OUT; after the stage `plan`."""
        return self._by_dataset(self._planned["codes"])

    def plan(self, of: Literal["all", "new"] = "all") -> SplitPlan:
        """Return the plan of the split, of all datasets or of those whose cells are written."""
        (found,) = self.crew.results("plan")
        return SplitPlan.of(found[of], self.codes[0 if of == "all" else self.n_earlier :])

    def planned(self, name: Literal["n_donors", "overdue"]) -> Any:
        """Return what else the stage `plan` has found.

        Args:
            name: `n_donors`, the donors of each dataset; or `overdue`, cells of earlier parts that
                would be left out as near duplicates now.
        """
        (found,) = self.crew.results("plan")
        return found[name]

    @cached_property
    def _to_scatter(self) -> list[StagedCells]:
        return self._cells_of(self._planned["codes"])[self.n_earlier :]

    def _scatter(self, number: int) -> Made:
        folder = self.work / "scattered"
        scatter_run(
            self._to_scatter, self._runs[number], self.layout, seed=self.rule.options.seed,
            folder=folder, number=number,
        )  # fmt: skip
        return self.crew.made_files(bounds_path(folder, number))

    @cached_property
    def _scattered(self) -> BucketRuns:
        return self._complete("scattered", len(self.layout), n_runs=len(self._runs))

    def _writer(self, path: Path) -> CellWriter:
        """Return a new writer; what a killed one has left is removed."""
        shutil.rmtree(path, ignore_errors=True)
        remove_partials_of(path)
        return CellWriter(
            path,
            n_genes=len(self.inputs.genes),
            codec=self.codec,
            chunk_entries=CHUNK_ENTRIES,
            chunks_per_shard=CHUNKS_PER_SHARD,
        )

    def unit_path(self, unit: int, suffix: str) -> Path:
        """Return a file of a unit of the store."""
        return self.work / "units" / f"{unit:06d}{suffix}"

    def _write(self, unit: int) -> Made:
        """Write a unit of the store and its statistics; return the names of the store's files."""
        path, n_genes = self.unit_path(unit, ".zarr"), len(self.inputs.genes)
        sums_path = self.unit_path(unit, ".sums.npz")
        sums = GeneSums.none(n_genes)

        def add(split: int, cells: PackedCells) -> None:
            if SPLITS[split] == "train":
                counts = decode(cells.gap, cells.count, cells.row_entries, n_genes)
                sums.add(counts, cells.row_total)

        with self._writer(path) as writer:
            write_unit(self._scattered, unit, self.layout, writer, seen=add)
        write_sums(sums_path, sums)
        names = CellStore(path).file_names()
        return self.crew.made_files(sums_path, *(path / name for name in names), result=names)

    def _join(self, unit: int) -> Made:
        """Make one store of all units; return the SHA-256 of its shards."""
        shards: dict[str, str] = {}
        joined = self.work / "cells.zarr"
        with self._writer(joined) as writer:
            append_no_cells(writer)  # those of no unit have tables, too
            for number, made in enumerate(self.crew.made("write")):
                path, first = self.unit_path(number, ".zarr"), number * self._unit_shards
                for name in made.result:
                    digest = made.files[f"units/{path.name}/{name}"]
                    stream, middle, shard = (*name.split("/"), "", "")[:3]
                    if middle == "c" and stream in ("gap", "count"):
                        shards[f"cells.zarr/{stream}/c/{first + int(shard)}"] = digest
                    elif file_sha256(path / name) != digest:
                        raise ValueError(f"{path / name}: damaged; {_CURE}")
                writer.adopt(path)
        paths = (joined / name for name in CellStore(joined).file_names())
        tables = self.crew.made_files(
            *(p for p in paths if p.relative_to(self.work).as_posix() not in shards)
        )
        return Made(result=shards, files={**shards, **tables.files})

    @cached_property
    def cells(self) -> CellStore:
        """All cells of the corpus; after the stage `join`."""
        return CellStore(self.work / "cells.zarr")

    def annotations(self, staged: Sequence[Staged]) -> list[Annotations]:
        """Return the annotations of datasets; after the stage `annotations`."""
        return [
            Annotations(obs=self._coded(s), n_cells=len(s.cells), tissue=s.ledger["tissue"])
            for s in staged
        ]

    @cached_property
    def _annotations(self) -> list[Annotations]:
        return self.annotations(self.new)

    @cached_property
    def columns(self) -> list[ColumnPlan]:
        """The columns to make; after the stage `annotations`."""
        return plan_columns(self._annotations)

    def _column(self, number: int) -> Made | None:
        """Write a column; return what is to know of it, None where it has too many values."""
        found = column_of(self.columns[number], self._annotations, self.cells)
        if found is None:
            return None
        folder = self.work / "columns-made"
        write_column(folder, number, found[1], found[0].bits)
        return self.crew.made_files(folder / column_name(number), result=asdict(found[0]))


def _each(do: Callable[[int], None], places: Sequence[int]) -> None:
    for place in places:
        do(place)


def _unit_bytes(staged: Sequence[Staged]) -> int:
    """Return the encoded cells of a unit of work on all cells of some datasets."""
    total = 2 * sum(int(s.cells.row_entries.sum(dtype=np.int64)) for s in staged)
    return min(max(total // USUAL_UNITS, LEAST_BYTES), MOST_BYTES)


def _staged_bytes(entry: LedgerEntry) -> int:
    return sum(int(size) for size, _ in entry["files"].values())
