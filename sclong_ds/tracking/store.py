"""The sqlite store of MLflow beside the run folders: made once, whole, whoever comes first.

MLflow makes its tables when a store is first used, without a lock: of runs that begin together,
several migrate one file at a time and destroy it. Here one process at a time makes the store, under
another name, and gives it its own when it is whole.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

from sclong_ds.files.atomic import locked, remove_partials_of, whole_file

_log = logging.getLogger(__name__)


def make_store(file: Path) -> None:
    """Make an sqlite store if it is not there, and check one that is.

    Args:
        file: Its file; the folder is made too.

    Raises:
        ValueError: A file that MLflow has not completed.
        OSError: It cannot be made.
    """
    # The common case takes no lock, so that a lock that somebody holds is no trouble.
    if not file.exists():
        with locked(file.with_name(f".{file.name}.lock")):
            if not file.exists():
                remove_partials_of(file)
                with whole_file(file) as partial:
                    _initialise(partial)
    _check(file)


def _initialise(file: Path) -> None:
    """Have MLflow make its tables in a file, and let go of it."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    artifacts = (file.parent / "mlartifacts").as_uri()
    store = SqlAlchemyStore(f"sqlite:///{file}", artifacts)
    store.engine.dispose()


def _check(file: Path) -> None:
    """Check that MLflow's tables were made to the end: the migration's own record comes last."""
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
            names = {name for (name,) in store.execute("select name from sqlite_master")}
            done = "alembic_version" in names and store.execute(
                "select count(*) from alembic_version"
            ).fetchone() == (1,)
    except sqlite3.OperationalError as error:
        # Busy, or on a disk that does not answer: that passes, and MLflow will say it.
        _log.debug("%s: %s", file, error)
        return
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{file} is not an sqlite store ({error}){_CURE}") from None
    if not (done and {"experiments", "runs"} <= names):
        raise ValueError(f"{file} was not made to its end{_CURE}")


_CURE = (
    ": move it away; the next start makes a new one, and `python -m sclong_ds sync RUN_DIR` sends "
    "it what a run folder holds"
)
