"""One corpus of many parts: what `finalize` makes of all their datasets at once.

    python -m data_prep compact CORPUS [--jobs N] [--task I --tasks N]

Reads the staging of all datasets, as `finalize` does, by the rule of the split and the options of
before; what was converted since comes in, too. The parts are removed when the new corpus is there.
Its content hash is another: a run that began on the parts does not continue on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.corpus.build import Codec
from data_prep.corpus.finalize import finalize
from data_prep.passes.dedup import Progress
from sclong_ds.corpus.catalogue import PARTS, read_catalogue


def compact(
    corpus: str | Path,
    *,
    codec: Codec | None = None,
    jobs: int = 1,
    task: int = 0,
    tasks: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make one corpus of the parts of a corpus; one without parts stays as it is.

    Args:
        corpus: Folder of a finished corpus, with its staging.
        codec: Of the cells; None: as before.
        jobs: Processes on this machine.
        task: Which of the tasks this is.
        tasks: Number of tasks, started with the same options.
        progress: Called with (stage, cells done, cells in all).

    Returns:
        The content of corpus.json.

    Raises:
        FileNotFoundError: No such folder, or not finalized.
        ValueError: Staging that is not there any more, damaged, or another command at work.
    """
    corpus = Path(corpus)
    if not (corpus / "ledger").is_dir() and not (corpus / PARTS).is_dir():
        return read_catalogue(corpus)  # A copy without staging, in which nobody can be at work.
    return finalize(
        corpus,
        codec=codec,
        allow_missing=True,
        whole=True,
        jobs=jobs,
        task=task,
        tasks=tasks,
        progress=progress,
    )
