"""The folder in which finalize builds a corpus, kept over kills: CORPUS/.finalize-KEY.

KEY stands for the inputs and options, so that a run finds what an earlier one with the same has
made. A folder that is not wanted any more is first renamed and then removed: a run that is killed
while it removes files never leaves half a folder under a name that another run would take up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from data_prep.corpus.split.rule import RULE_FILE
from sclong_ds.files.atomic import listed, remove_partials, remove_partials_of

_log = logging.getLogger(__name__)

PREFIX = ".finalize-"
_OLD = f"{PREFIX}old-"


def open_work(corpus: Path, content: Any) -> Path:
    """Return the folder for some work, with what was done of it; other work is removed.

    Args:
        corpus: The corpus folder, whose lock is held.
        content: What decides the result, as JSON.
    """
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    work = corpus / f"{PREFIX}{key}"
    clear(corpus, keep=work)
    if work.exists():
        _log.info("%s: continuing what an earlier run has begun", corpus)
        remove_partials(work)
    (work / "done").mkdir(parents=True, exist_ok=True)
    return work


def clear(corpus: Path, *, keep: Path | None = None) -> None:
    """Remove what earlier runs have left.

    Args:
        corpus: The corpus folder, in which no other finalize is at work.
        keep: A work folder that stays.
    """
    for other in listed(corpus):
        if not other.name.startswith(PREFIX):
            continue
        if other.name.startswith(_OLD):
            shutil.rmtree(other)
        elif other != keep:
            discard(other)
    for name in ("corpus.json", RULE_FILE):
        remove_partials_of(corpus / name)


def work_folder(corpus: Path, name: str) -> Path:
    """Return the work folder that `open_work` has made for another process.

    Args:
        corpus: The corpus folder.
        name: Name of the folder.
    """
    if not name.startswith(PREFIX) or "/" in name:
        raise ValueError(f"{corpus}: '{name}' is no work folder of finalize")
    return corpus / name


def discard(work: Path) -> None:
    """Remove a folder of `open_work`; killed in between, the next `open_work` removes the rest.

    Args:
        work: The folder.
    """
    old = work.with_name(f"{_OLD}{secrets.token_hex(8)}")
    os.rename(work, old)
    shutil.rmtree(old)
