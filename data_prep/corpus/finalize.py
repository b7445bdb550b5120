"""From converted datasets to a corpus: drop duplicates, split, shuffle, write, describe.

    python -m data_prep finalize CORPUS [--jobs N] [--task I --tasks N]

Reads CORPUS/settings.json, manifests/, ledger/ and staging/ (written by convert; datasets that are
not `ok` are left out and listed; one that was never converted is an error). All inputs are compared
with their checksums before they are used, and those that were written to again before the corpus is
published; no convert runs meanwhile. Writes genes.tsv, cells.zarr, obs/, columns/, gene_stats.npz,
measured_genes.npy, CITATIONS.md, checksums.json and, last, corpus.json; `sclong_ds.corpus.corpus`
describes them. All is built in `CORPUS/.finalize-KEY` and moved at the end, so a killed run leaves
the corpus that was there, or none. The same staging and options give the same bytes, and the same
KEY: started again, the command continues after the last finished unit of work
(`data_prep.corpus.build`), and does those again whose files have changed since. Processes share the
units (`data_prep.passes.crew`): those of `--jobs`, and the tasks of a job array, of which any
number may run, in any order; several tasks need a file system whose locks hold between them.
Memory: about a GB a process, and for the plan of the split 60 bytes a cell.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

from data_prep.corpus.build import STAGES, Build, Codec
from data_prep.corpus.growth.earlier import (
    EARLIER,
    MISSING,
    EarlierParts,
    earlier_parts,
    find_earlier,
    finished_inputs,
)
from data_prep.corpus.growth.part_list import remove_unlisted
from data_prep.corpus.inputs import Inputs, read_inputs
from data_prep.corpus.near.kept_cells import forget_lost
from data_prep.corpus.near.near_duplicates import NearRule
from data_prep.corpus.publish import begun, is_sealed, publish
from data_prep.corpus.seal import restated, seal, unused
from data_prep.corpus.split_rule import SplitBy, SplitRule, read_rule, resolve, rule_of
from data_prep.corpus.staged import open_used
from data_prep.corpus.work_folder import clear, discard, open_work, work_folder
from data_prep.ledger.corpus_lock import alone_in_corpus, tasks_in_corpus
from data_prep.ledger.ledger import LedgerEntry, read_ledger
from data_prep.ledger.pending import Pending, read_pending, tasks_to_run
from data_prep.passes.crew import Crew, WorkIsGone, has_failed
from data_prep.passes.dedup import Progress
from sclong_ds.corpus.catalogue import PARTS, read_catalogue, write_catalogue
from sclong_ds.corpus.location import Location
from sclong_ds.corpus.shards import read_metadata
from sclong_ds.files.atomic import named_errors

logger = logging.getLogger(__name__)

_MOST_NAMES = 10
"""Datasets that a message names."""
_WORK_VERSION = 11
"""Raised when an interrupted run of an older program could not be continued."""


def finalize(
    corpus: str | Path,
    *,
    seed: int | None = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    split_by: SplitBy | None = None,
    validation_datasets: Sequence[str] = (),
    codec: Codec | None = None,
    near_duplicates: NearRule | None = None,
    allow_missing: bool = False,
    whole: bool = False,
    jobs: int = 1,
    task: int = 0,
    tasks: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build the corpus from everything that is staged.

    What is None or empty is as it was before. New datasets become a part of their own, unless
    something of what was finished has changed (`data_prep.corpus.growth.earlier`).

    Args:
        corpus: Folder that convert has filled.
        seed: Seed of the split and of the order of the cells (0).
        validation_fraction: Share of the cells to hold out for validation (0.05), about.
        test_fraction: The same for a test split (0).
        split_by: donor, dataset or cell; auto takes the first that gives enough groups.
        validation_datasets: Datasets to validate on, instead of a share.
        codec: zstd (at first) or none (twice the size, for fast local disks).
        near_duplicates: `primary` (at first) leaves out near duplicates that are not primary data
            beside one that is, `drop` all but one, `keep` none.
        allow_missing: Continue without datasets that were to be converted and never were.
        whole: Make one corpus of the parts that were finished; one without parts stays as it is.
        jobs: Processes on this machine.
        task: Which of the tasks this is: where it begins among the units of work.
        tasks: Number of tasks, started with the same options; each returns when all is done.
        progress: Called with (stage, cells done, cells in all).

    Returns:
        The content of corpus.json.

    Raises:
        FileNotFoundError: No such folder, nothing was converted; `whole`: nothing finalized.
        ValueError: Datasets that were never converted, no usable dataset, impossible options,
            inputs that are damaged or change meanwhile, or another finalize or a convert at work.
    """
    corpus = Path(corpus)
    given = _given(seed, validation_fraction, test_fraction, split_by, validation_datasets)
    if not (corpus / "ledger").is_dir():
        read_ledger(corpus)  # Says what to do; no lock file is made in a folder that is no corpus.
    job = _Job(corpus, given, codec, near_duplicates, allow_missing=allow_missing, whole=whole)
    members = range(task * jobs, (task + 1) * jobs)
    with named_errors(corpus):
        if tasks is None or tasks == 1:
            catalogue = _as_one_command(job, members, progress, again=tasks is None)
        else:
            catalogue = _as_task(job, members, jobs * tasks, progress)
    _warn(corpus, catalogue)
    return catalogue


def _warn(corpus: Path, catalogue: Mapping[str, Any]) -> None:
    for warning in (*catalogue["warnings"], *_dataset_warnings(corpus, catalogue["datasets"])):
        logger.warning("%s", warning)


def _given(
    seed: int | None,
    validation_fraction: float | None,
    test_fraction: float | None,
    split_by: SplitBy | None,
    validation_datasets: Sequence[str],
) -> dict[str, Any]:
    """Return the options of a split by the names of `SplitOptions`."""
    return {
        "seed": seed,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "split_by": split_by,
        "validation_datasets": tuple(validation_datasets),
    }


class _Job:
    """What one call of finalize is about."""

    def __init__(
        self,
        corpus: Path,
        given: Mapping[str, Any],
        codec: Codec | None,
        near: NearRule | None,
        *,
        allow_missing: bool,
        whole: bool,
    ) -> None:
        self.corpus, self.given, self.allow_missing = corpus, given, allow_missing
        self.whole, self.asked = whole, (codec, near)
        self.codec: Codec
        self.near: NearRule
        self.lock = corpus / ".locks" / "~units"
        """Of the units of the work."""
        self.inputs: Inputs
        self.pending: list[Pending]

    def read(self) -> None:
        """Read what lies in the folder; staged files are not compared yet."""
        self.inputs = read_inputs(self.corpus)
        self.pending = _pending(self.corpus, self.inputs.ledger, allow_missing=self.allow_missing)

    @property
    def call(self) -> str:
        """What all tasks of one work have in common."""
        options = [*self.given.items(), *self.asked]
        missing = [dataset.dataset_id for dataset in self.pending]
        return _hash([_WORK_VERSION, options, self.inputs.documents, missing, self.whole])

    def settle(self) -> None:
        """Take the options that are not given from the corpus."""
        codec, near = "zstd", "primary"
        with suppress(ValueError, LookupError, *MISSING):
            catalogue, codec = begun(self.corpus)
            near = catalogue.get("near_duplicates", near)
        self.codec = self.asked[0] or cast("Codec", codec)
        self.near = self.asked[1] or cast("NearRule", near)

    def rule(self) -> SplitRule:
        """Return the rule of the split: that of the corpus and what is given; settle the rest."""
        self.settle()
        before = read_rule(self.corpus)
        rule = resolve(self.given, before)
        if before is not None and rule.datasets != before.datasets:
            logger.warning(
                "%s: the split is drawn again (seed %s, split_by %s; before: %s, %s): validation "
                "figures before and after cannot be compared, and earlier models were trained on "
                "cells that are held out now",
                *(self.corpus, rule.options.seed, rule.options.split_by),
                *(before.options.seed, before.options.split_by),
            )
        return rule

    def open(self, rule: SplitRule) -> tuple[Path, SplitRule]:
        """Return the work folder, with what an earlier run has left of this work, and its rule."""
        missing = [dataset.dataset_id for dataset in self.pending]
        ledger = [dict(entry) for entry in self.inputs.ledger]
        earlier = self.earlier(rule)
        if earlier is not None:
            rule = earlier.rule
        options = [rule.as_json(), self.codec, self.near]
        content = [_WORK_VERSION, *options, ledger, self.inputs.documents, missing]
        if earlier is not None:
            content.append(earlier.catalogue["hash"])
        work = open_work(self.corpus, content)
        sealed = (work / "corpus.json").exists()
        if has_failed(work) or (sealed and not is_sealed(self.corpus, work)):
            discard(work)
            work = open_work(self.corpus, content)
        elif not sealed:
            forget_lost(work)
        if earlier is not None:
            (work / EARLIER).mkdir(exist_ok=True)
            write_catalogue(work / EARLIER, earlier.catalogue)
        return work, rule

    def earlier(self, rule: SplitRule) -> EarlierParts | None:
        """Return the parts that this work adds one to; None where it makes one corpus."""
        if self.whole:
            return None
        found, reason = find_earlier(
            self.corpus, self.inputs, rule, codec=self.codec, near=self.near
        )
        if reason:
            logger.warning(
                "%s: is made again as one corpus, with another hash: %s", self.corpus, reason
            )
        return found

    def is_finished(self, rule: SplitRule) -> bool:
        """Tell whether the corpus is what this call would make; its cells are not read."""
        try:
            catalogue = read_catalogue(self.corpus)
            cells = read_metadata(Location(self.corpus / "cells.zarr"))
            return (
                not (self.whole and PARTS in catalogue)
                and catalogue.get("split_rule") == rule.as_json()
                and catalogue.get("near_duplicates") == self.near
                and catalogue.get("unused") == unused(self.inputs, self.pending)
                and cells["attributes"]["codec"] == self.codec
                and finished_inputs(self.corpus, catalogue) == self.inputs.checksums()
            )
        except (ValueError, KeyError, *MISSING):
            return False

    def finished(self) -> dict[str, Any] | None:
        """Return the catalogue of the corpus if this call finds nothing to do, None otherwise.

        No other process may be at work in the folder: one that publishes has no corpus there.

        Raises:
            FileNotFoundError: One corpus is to be made of the parts, and nothing was finalized.
        """
        if self.whole and PARTS not in begun(self.corpus)[0] and not self.has_parts:
            return read_catalogue(self.corpus)
        return None

    def restate(self, rule: SplitRule) -> bool:
        """Tell whether the parts hold all cells already; then write which datasets are unused.

        The cells stay, and with them the hash: a dataset that failed concerns none of them.
        """
        if self.whole or not self.has_parts:
            return False
        try:
            catalogue = read_catalogue(self.corpus)
        except (ValueError, *MISSING):
            return False
        if PARTS not in catalogue or len(self.inputs.used) != len(catalogue["datasets"]):
            return False
        if not find_earlier(self.corpus, self.inputs, rule, codec=self.codec, near=self.near)[0]:
            return False
        self.inputs.check_documents()
        write_catalogue(self.corpus, restated(catalogue, self.inputs, self.pending))
        return True

    @property
    def has_parts(self) -> bool:
        """Whether there are parts, be it those that a killed compact has left."""
        return (self.corpus / PARTS).is_dir()

    def crew(self, work: Path, member: int, members: int, progress: Progress | None) -> Crew:
        """Return one of the processes of the work."""
        return Crew(
            work, self.lock, stages=STAGES, member=member, members=members, progress=progress
        )

    def work_through(self, crew: Crew, rule: SplitRule) -> None:
        """Do what is left of the work; return when it is sealed, whoever has done that.

        Raises:
            ValueError: Impossible options or damaged staging.
        """
        sealed = crew.work / "corpus.json"
        if sealed.exists():
            return
        try:
            staged = open_used(self.corpus, self.inputs, rule)
            earlier = None
            if (crew.work / EARLIER).is_dir():
                earlier = earlier_parts(self.corpus, read_catalogue(crew.work / EARLIER))
            build = Build(
                crew, inputs=self.inputs, staged=staged, rule=rule, codec=self.codec,
                near=self.near, earlier=earlier,
            )  # fmt: skip
            build.make_products()
            # Never twice: another process may be moving what it lists.
            crew.run("seal", [0], lambda _: None if sealed.exists() else seal(build, self.pending))
        except (OSError, ValueError) as error:
            # Others were faster, and move or have removed what this process was about to read.
            if crew.work.is_dir() and not sealed.exists():
                with crew.damage_ends_the_work():
                    raise error


def _as_one_command(
    job: _Job, members: range, progress: Progress | None, *, again: bool
) -> dict[str, Any]:
    """Make the corpus, or continue that, with no other command beside; `again` if it is there."""
    with alone_in_corpus(job.corpus), tempfile.TemporaryFile() as local:
        # All processes are on this machine, whose own folder has locks; without a name, the file is
        # gone after a kill, too.
        job.lock = Path(f"/proc/self/fd/{local.fileno()}")
        if (catalogue := job.finished()) is not None:
            return catalogue
        job.read()
        rule = job.rule()
        # One corpus is made again, as it was asked for; a list of parts with nothing new stays.
        if (not again or job.has_parts) and (job.is_finished(rule) or job.restate(rule)):
            clear(job.corpus)
            remove_unlisted(job.corpus)
            return read_catalogue(job.corpus)
        work, rule = job.open(rule)
        try:
            with _others(job, work, rule, members[1:], len(members)):
                crew = job.crew(work, 0, len(members), progress)
                try:
                    job.work_through(crew, rule)
                finally:
                    crew.close()
            if not work.is_dir():
                raise WorkIsGone
            catalogue = publish(job.corpus, work)
        except ValueError:
            # The same command would fail again.
            if work.is_dir():
                discard(work)
            raise
        except WorkIsGone:
            raise ValueError(
                f"{work}: was removed while finalize was at work in it; run finalize again"
            ) from None
        discard(work)
        remove_unlisted(job.corpus)
        return catalogue


def _as_task(
    job: _Job, members: range, n_members: int, progress: Progress | None
) -> dict[str, Any]:
    """Do a share of the work, and what others leave; return when the corpus is there."""
    job.read()

    def begin() -> dict[str, Any]:
        job.inputs.check_documents()
        if job.finished() is not None:
            return {"call": job.call, "work": None}
        rule = job.rule()
        if job.is_finished(rule) or job.restate(rule):
            clear(job.corpus)
            remove_unlisted(job.corpus)
            return {"call": job.call, "work": None}
        work, rule = job.open(rule)
        made = {"codec": job.codec, "near": job.near}
        return {"call": job.call, "work": work.name, "rule": rule.as_json(), **made}

    with tasks_in_corpus(job.corpus, begin) as said:
        if said["call"] != job.call:
            raise ValueError(
                f"{job.corpus}: another finalize, with other options or of other datasets, is at "
                "work here; wait for it"
            )
        if said["work"] is None:
            return read_catalogue(job.corpus)
        work, rule = work_folder(job.corpus, said["work"]), rule_of(said["rule"])
        job.codec, job.near = said["codec"], said["near"]
        if not work.is_dir():
            return read_catalogue(job.corpus)

        def put_out(_: int) -> None:
            publish(job.corpus, work)
            discard(work)
            remove_unlisted(job.corpus)
            raise WorkIsGone

        with suppress(WorkIsGone), _others(job, work, rule, members[1:], n_members):
            crew = job.crew(work, members[0], n_members, progress)
            try:
                job.work_through(crew, rule)
                crew.run("publish", [0], put_out)
            finally:
                crew.close()
        return read_catalogue(job.corpus)


@contextmanager
def _others(
    job: _Job, work: Path, rule: SplitRule, members: range, n_members: int
) -> Iterator[None]:
    """Let more processes do units of the work as long as the block runs.

    One that fails or is killed leaves its unit to the others.
    """
    context = multiprocessing.get_context("fork")
    started = []
    try:
        for member in members:
            arguments = job, work, rule, member, n_members
            process = context.Process(target=_help, args=arguments, daemon=True)
            process.start()
            started.append(process)
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()
            process.close()


def _help(job: _Job, work: Path, rule: SplitRule, member: int, n_members: int) -> None:
    """Run in a process of its own."""
    # Ctrl-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    crew = job.crew(work, member, n_members, None)
    try:
        job.work_through(crew, rule)
    except WorkIsGone:
        return
    except (ValueError, OSError) as error:
        logger.debug("process %d of %d: %s", member, n_members, error)


def _end_with_parent() -> None:
    """Stop this process when its parent is gone: it holds the lock of the corpus, too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _dataset_warnings(corpus: Path, datasets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line that counts and names the datasets whose ledger has warnings, if any."""
    numbers = {info["dataset_id"]: len(info.get("warnings") or ()) for info in datasets}
    found = [f"{name} ({number})" for name, number in numbers.items() if number]
    if not found:
        return []
    more = f", and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    return [
        f"{sum(numbers.values())} warnings about {len(found)} of the {len(datasets)} datasets "
        f"used: {', '.join(found[:_MOST_NAMES])}{more}; see: python -m data_prep status {corpus}"
    ]


def _pending(corpus: Path, ledger: Sequence[LedgerEntry], *, allow_missing: bool) -> list[Pending]:
    """Return the datasets that were never converted; they are an error unless allowed."""
    pending = read_pending(corpus, ledger)
    if pending and not allow_missing:
        names = ", ".join(dataset.dataset_id for dataset in pending[:3])
        raise ValueError(
            f"{corpus}: {len(pending)} of {len(ledger) + len(pending)} datasets were not converted "
            f"yet ({names}{', ...' if len(pending) > 3 else ''}): {tasks_to_run(pending)}, or "
            "finalize with --allow-missing to continue without them"
        )
    return pending
