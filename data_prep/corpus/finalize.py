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
from typing import Any

from data_prep.corpus.build import STAGES, Build, Codec
from data_prep.corpus.growth.earlier import EARLIER, earlier_parts
from data_prep.corpus.growth.part_list import remove_unlisted
from data_prep.corpus.job import Job
from data_prep.corpus.near.near_duplicates import NearRule
from data_prep.corpus.publish import publish
from data_prep.corpus.seal import seal
from data_prep.corpus.split.rule import SplitBy, SplitRule, rule_of
from data_prep.corpus.staged import open_used
from data_prep.corpus.work_folder import discard, work_folder
from data_prep.ledger.corpus_lock import alone_in_corpus, tasks_in_corpus
from data_prep.ledger.ledger import read_ledger
from data_prep.passes.crew import Crew, WorkIsGone
from data_prep.passes.dedup import Progress
from sclong_ds.corpus.catalogue import read_catalogue
from sclong_ds.files.atomic import named_errors
from sclong_ds.page.words import counted

logger = logging.getLogger(__name__)

_MOST_NAMES = 10
"""Datasets that a message names."""


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
    job = Job(corpus, given, codec, near_duplicates, allow_missing=allow_missing, whole=whole)
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


def _crew(job: Job, work: Path, member: int, members: int, progress: Progress | None) -> Crew:
    """Return one of the processes of the work."""
    return Crew(work, job.lock, stages=STAGES, member=member, members=members, progress=progress)


def _work_through(job: Job, crew: Crew, rule: SplitRule) -> None:
    """Do what is left of the work; return when it is sealed, whoever has done that.

    Raises:
        ValueError: Impossible options or damaged staging.
    """
    sealed = crew.work / "corpus.json"
    if sealed.exists():
        return
    try:
        staged = open_used(job.corpus, job.inputs, rule)
        earlier = None
        if (crew.work / EARLIER).is_dir():
            earlier = earlier_parts(job.corpus, read_catalogue(crew.work / EARLIER))
        build = Build(
            crew, inputs=job.inputs, staged=staged, rule=rule, codec=job.codec,
            near=job.near, earlier=earlier,
        )  # fmt: skip
        build.make_products()
        # Never twice: another process may be moving what it lists.
        crew.run("seal", [0], lambda _: None if sealed.exists() else seal(build, job.pending))
    except (OSError, ValueError) as error:
        # Others were faster, and move or have removed what this process was about to read.
        if crew.work.is_dir() and not sealed.exists():
            with crew.damage_ends_the_work():
                raise error


def _as_one_command(
    job: Job, members: range, progress: Progress | None, *, again: bool
) -> dict[str, Any]:
    """Make the corpus, or continue that, with no other command beside; `again` if it is there."""
    with alone_in_corpus(job.corpus), tempfile.TemporaryFile() as local:
        # All processes are on this machine, whose own folder has locks; without a name, the file is
        # gone after a kill, too.
        job.lock = Path(f"/proc/self/fd/{local.fileno()}")
        begun = job.begin(again=again)
        if begun is None:
            return read_catalogue(job.corpus)
        work, rule = begun
        try:
            with _others(job, work, rule, members[1:], len(members)):
                crew = _crew(job, work, 0, len(members), progress)
                try:
                    _work_through(job, crew, rule)
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


def _as_task(job: Job, members: range, n_members: int, progress: Progress | None) -> dict[str, Any]:
    """Do a share of the work, and what others leave; return when the corpus is there."""

    def begin() -> dict[str, Any]:
        begun = job.begin()
        if begun is None:
            return {"options": job.options_hash, "work": None}
        work, rule = begun
        made = {"rule": rule.as_json(), "codec": job.codec, "near": job.near}
        both = {"options": job.options_hash, "inputs": job.inputs_hash}
        return {**both, "work": work.name, **made}

    with tasks_in_corpus(job.corpus, begin) as said:
        same = said["options"] == job.options_hash
        if same and (said["work"] is None or not work_folder(job.corpus, said["work"]).is_dir()):
            return read_catalogue(job.corpus)
        if not same or said["inputs"] != job.inputs_hash:
            raise ValueError(
                f"{job.corpus}: another finalize, with other options or of other datasets, is at "
                "work here; wait for it"
            )
        work, rule = work_folder(job.corpus, said["work"]), rule_of(said["rule"])
        job.codec, job.near = said["codec"], said["near"]

        def put_out(_: int) -> None:
            publish(job.corpus, work)
            discard(work)
            remove_unlisted(job.corpus)
            raise WorkIsGone

        with suppress(WorkIsGone), _others(job, work, rule, members[1:], n_members):
            crew = _crew(job, work, members[0], n_members, progress)
            try:
                _work_through(job, crew, rule)
                crew.run("publish", [0], put_out)
            finally:
                crew.close()
        return read_catalogue(job.corpus)


@contextmanager
def _others(
    job: Job, work: Path, rule: SplitRule, members: range, n_members: int
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


def _help(job: Job, work: Path, rule: SplitRule, member: int, n_members: int) -> None:
    """Run in a process of its own."""
    # Ctrl-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    crew = _crew(job, work, member, n_members, None)
    try:
        _work_through(job, crew, rule)
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


def _dataset_warnings(corpus: Path, datasets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line that counts and names the datasets whose ledger has warnings, if any."""
    numbers = {info["dataset_id"]: len(info.get("warnings") or ()) for info in datasets}
    found = [f"{name} ({number})" for name, number in numbers.items() if number]
    if not found:
        return []
    more = f", and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    return [
        f"{counted(sum(numbers.values()), 'warning')} about {len(found)} of the "
        f"{counted(len(datasets), 'dataset')} "
        f"used: {', '.join(found[:_MOST_NAMES])}{more}; see: python -m data_prep status {corpus}"
    ]
