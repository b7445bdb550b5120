"""One file from its address to its place: resumed, checked, moved there whole.

Beside the files lies a folder `.fetched`: for each file a record (address, size, SHA-256), and,
while it is on its way, `NAME.part` with `NAME.part.json`, which says of what the bytes are a part.
A file that lies at its place without a record was brought by the user: it is taken if it is what
the list says, and never written to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from data_prep.fetch.budgets import Bandwidth, DiskBudget, Hosts, Stopped
from data_prep.fetch.item import Item
from data_prep.fetch.remote import Body, FetchError, open_remote
from data_prep.fetch.soundness import check_sound
from sclong_ds.files.atomic import file_sha256, locked, read_json, remove_partials_of, write_atomic

STATE = ".fetched"
NO_ROOM = "the disk has"
"""In the reason where a file does not fit the disk now."""
_SYNC_BYTES = 1 << 26
_ENOUGH_GAIN = 1 << 16
"""A try that brought more bytes, or more than 5%, is no failure in a row."""


class Record(TypedDict):
    """What is known of a file that lies at its place."""

    url: str
    version: str
    size: int
    sha256: str
    mtime_ns: int
    mark: str
    """See `Body.mark`."""
    brought: bool
    """It was there before, without a record: never removed."""


@dataclass(slots=True, kw_only=True)
class Rules:
    """How to download, shared by all files of a command."""

    attempts: int = 8
    """Tries in a row without a gain."""
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    silence_s: float = 60.0
    least_bytes_per_s: float = 1024.0
    """Slower over `silence_s`, and the connection is made again."""
    bandwidth: Bandwidth = field(default_factory=lambda: Bandwidth(None))
    disk: DiskBudget = field(default_factory=lambda: DiskBudget(None))
    hosts: Hosts = field(default_factory=Hosts)
    stop: threading.Event = field(default_factory=threading.Event)
    retried: Callable[[Item, str], None] = lambda item, reason: None
    """Called before a file is tried again, with the reason."""
    progress: Callable[[Item, int, int | None], None] = lambda item, done, total: None
    """Called with the bytes of a file that are here, and all of them if known."""


class Place:
    """Where a file and its state lie."""

    def __init__(self, folder: Path, item: Item) -> None:
        """Name the paths; nothing is made.

        Args:
            folder: The folder of the files.
            item: The file.
        """
        name = item.file_name
        self.target, state = folder / name, folder / STATE
        self.record, self.lock = state / f"{name}.json", state / f"{name}.lock"
        self.part, self.begun = state / f"{name}.part", state / f"{name}.part.json"

    def bytes_here(self) -> int:
        """Return the bytes of the file or of its part."""
        return sum(p.stat().st_size for p in (self.target, self.part) if p.is_file())

    def drop_part(self) -> None:
        """Remove what came so far."""
        self.part.unlink(missing_ok=True)
        self.begun.unlink(missing_ok=True)


def fetch_file(item: Item, folder: Path, rules: Rules) -> Record:
    """Bring a file to its place; one that is there is only looked at.

    Args:
        item: The file.
        folder: Where it comes to lie; made if missing.
        rules: How to download.

    Raises:
        FetchError: Why it is not there; what came of it stays for the next time.
        Stopped: The program ends.
    """
    place = Place(folder, item)
    # Without the lock first: a folder that cannot be written may hold all that is wanted.
    record = _known(item, place)
    if record is not None:
        return record
    with _local(folder):
        place.lock.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(place.lock)
        lock.__enter__()
    try:
        return _known(item, place) or _insist(item, place, rules)
    finally:
        lock.__exit__(None, None, None)


def remove_fetched(item: Item, folder: Path) -> bool:
    """Remove a file that was fetched, and its record; one that the user brought stays.

    Args:
        item: The file.
        folder: Where it lies.

    Returns:
        Whether it was removed.
    """
    place = Place(folder, item)
    record = read_record(place.record)
    if record is None or record["brought"] or not _is_untouched(place, record):
        return False
    place.target.unlink()
    place.record.unlink()
    return True


def read_record(path: Path) -> Record | None:
    """Return the record of a file; None where there is none that can be read.

    Args:
        path: See `Place.record`.
    """
    try:
        found = read_json(path, cure="")
    except (ValueError, OSError):
        return None
    kinds = Record.__annotations__
    complete = isinstance(found, dict) and kinds.keys() <= found.keys()
    return found if complete else None


def _is_untouched(place: Place, record: Record) -> bool:
    try:
        about = place.target.stat()
    except FileNotFoundError:
        return False
    return (about.st_size, about.st_mtime_ns) == (record["size"], record["mtime_ns"])


def _known(item: Item, place: Place) -> Record | None:
    """Return the record of a file that is there, whoever brought it; None: it is to be fetched."""
    if not os.path.lexists(place.target):
        return None
    record = read_record(place.record)
    with _local(place.target):
        if record is not None and _is_untouched(place, record):
            same = item.sha256 in ("", record["sha256"]) and item.size in (None, record["size"])
            return record if same and item.url == record["url"] else None
        return _brought(item, place)


def _brought(item: Item, place: Place) -> Record:
    """Take a file that the user laid there, or changed, if it is what the list says."""
    cure = "it was not fetched here and is left alone; move it away to fetch this one"
    size = place.target.stat().st_size
    digest = file_sha256(place.target)
    if item.size not in (None, size):
        raise FetchError(
            f"{place.target}: {size} bytes, the list says {item.size}: {cure}", again=False
        )
    if item.sha256 not in ("", digest):
        raise FetchError(
            f"{place.target}: another SHA-256 than the lock file's: {cure}", again=False
        )
    try:
        check_sound(place.target, name=place.target.name)
    except ValueError as error:
        raise FetchError(f"{place.target}: {error}: {cure}", again=False) from None
    record = _record_of(item, place.target, digest, mark="", brought=True)
    try:
        place.record.parent.mkdir(exist_ok=True)
        write_atomic(place.record, json.dumps(record, indent=1).encode())
    except OSError:
        # A folder that cannot be written: the file is read again next time.
        return record
    return record


def _record_of(item: Item, path: Path, digest: str, *, mark: str, brought: bool = False) -> Record:
    about = path.stat()
    return Record(
        url=item.url,
        version=item.version,
        size=about.st_size,
        sha256=digest,
        mtime_ns=about.st_mtime_ns,
        mark=mark,
        brought=brought,
    )


def _insist(item: Item, place: Place, rules: Rules) -> Record:
    """Try until the file is there, or trying makes no sense."""
    for written in (place.begun, place.record):
        with _local(written):
            remove_partials_of(written)
    row = tries = 0
    while True:
        before = place.part.stat().st_size if place.part.exists() else 0
        rules.hosts.wait(item.url, rules.stop)
        try:
            return _try(item, place, rules)
        except FetchError as error:
            here = place.part.stat().st_size if place.part.exists() else 0
            enough = min(_ENOUGH_GAIN, item.size // 20 if item.size else here // 20)
            row = 1 if here - before > enough else row + 1
            tries += 1
            if not error.again:
                raise
            if row >= rules.attempts or tries >= (error.most or tries + 1):
                raise FetchError(f"{error} (tried {tries} times)", again=False) from None
            rules.retried(item, str(error))
            _pause(item, error, row, rules)


def _pause(item: Item, error: FetchError, row: int, rules: Rules) -> None:
    if error.wait_s is not None:
        rules.hosts.pause(item.url, error.wait_s)
        return
    longest = min(rules.first_wait_s * 2 ** (row - 1), rules.longest_wait_s)
    # Downloads that failed together should not come back together.
    if rules.stop.wait(longest * random.uniform(0.5, 1.0)):
        raise Stopped


def _try(item: Item, place: Place, rules: Rules) -> Record:
    """Fetch what is missing of a file, check it, and move it to its place."""
    start, begun = _begun(item, place)
    mark = str(begun.get("mark", ""))
    if not (start and start == (item.size or begun.get("total"))):
        mark = _bring(item, place, rules, start, mark)
    with _local(place.part):
        digest = file_sha256(place.part)
        size = place.part.stat().st_size
    wrong = ""
    if item.size not in (None, size):
        wrong = f"{size} bytes came, the list says {item.size}"
    elif item.sha256 not in ("", digest):
        wrong = "another SHA-256 than when it was first fetched: changed under its name"
    else:
        try:
            with _local(place.part):
                check_sound(place.part, name=place.target.name)
        except FetchError:
            raise
        except ValueError as error:
            wrong = str(error)
    if wrong:
        place.drop_part()
        raise FetchError(wrong, most=3)
    return _settle(item, place, digest, mark)


def _settle(item: Item, place: Place, digest: str, mark: str) -> Record:
    """Move a file that is whole to its place."""
    with _local(place.target):
        record = _record_of(item, place.part, digest, mark=mark)
        # Somebody may have laid a file there meanwhile, which is not ours to replace.
        old = read_record(place.record)
        if os.path.lexists(place.target) and not (old and _is_untouched(place, old)):
            raise FetchError(
                f"{place.target}: another file lies there now; move it away", again=False
            )
        # The record first: a kill behind it finds the part whole, one behind the move finds both.
        if not os.path.lexists(place.target):
            write_atomic(place.record, json.dumps(record, indent=1).encode())
        os.replace(place.part, place.target)
        write_atomic(place.record, json.dumps(record, indent=1).encode())
        place.begun.unlink(missing_ok=True)
    return record


def _begun(item: Item, place: Place) -> tuple[int, dict[str, Any]]:
    """Return how many bytes of the file are here for certain, and what they are a part of."""
    try:
        begun = json.loads(place.begun.read_bytes())
        size = place.part.stat().st_size
        if begun["url"] != item.url or begun["version"] != item.version or not begun["mark"]:
            return 0, {}
        # Bytes that a machine had not flushed when it went down may read as zeros.
        return (size if begun["boot"] == _boot() else min(size, begun["synced"])), begun
    except (ValueError, KeyError, TypeError, OSError):
        return 0, {}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _bring(item: Item, place: Place, rules: Rules, start: int, mark: str) -> str:
    """Append what is missing to the part; return the mark of the file."""
    try:
        with open_remote(item.address, start=start, mark=mark, silence_s=rules.silence_s) as body:
            if item.size is not None and body.total not in (None, item.size):
                raise FetchError(
                    f"{body.total} bytes on the server, the list says {item.size}: changed under "
                    "its name (a new list may know it: --update)",
                    most=2,
                )
            _make_room(item, place, rules, body)
            with _local(place.part), place.part.open("ab") as file:
                file.truncate(body.start)
            begun = {
                "url": item.url,
                "version": item.version,
                "mark": body.mark,
                "total": body.total,
            }
            _append(item, place, rules, body, begun)
            return body.mark
    except FetchError as error:
        if "between two parts" in str(error) or "another one than before" in str(error):
            place.drop_part()
        raise
    finally:
        rules.disk.expect_no_more(item.file_name)


def _make_room(item: Item, place: Place, rules: Rules, body: Body) -> None:
    """Refuse a file that the budget or the disk cannot hold, before a byte of it is written."""
    total = body.total or item.size
    if total is None:
        return
    if not rules.disk.hold(item.file_name, total):
        raise _too_large(total, rules)

    def free() -> int:
        return shutil.disk_usage(place.part.parent).free

    with _local(place.part):
        here = place.part.stat().st_size if place.part.exists() else 0
        if not rules.disk.expect(item.file_name, total - here, free):
            raise FetchError(
                f"needs {total - here} bytes, {NO_ROOM} {free()} left, of which other files on "
                "their way take some",
                again=False,
            )


def _too_large(n_bytes: int, rules: Rules) -> FetchError:
    return FetchError(
        f"{n_bytes} bytes do not fit the disk budget of {rules.disk.most}", again=False
    )


def _append(item: Item, place: Place, rules: Rules, body: Body, begun: dict[str, Any]) -> None:
    done = synced = body.start
    with _local(place.part):
        file = place.part.open("ab")
    with file:
        _note(place, file, begun, synced)
        try:
            for chunk in _steady(body.chunks(), rules):
                done += len(chunk)
                if body.total is None:
                    if not rules.disk.hold_at_least(item.file_name, done):
                        raise _too_large(done, rules)
                elif done > body.total:
                    raise FetchError("more bytes came than the server said", most=3)
                with _local(place.part):
                    file.write(chunk)
                rules.disk.came(item.file_name, len(chunk))
                rules.progress(item, done, body.total or item.size)
                rules.bandwidth.take(len(chunk), rules.stop)
                if done - synced >= _SYNC_BYTES:
                    _note(place, file, begun, done)
                    synced = done
        finally:
            _note(place, file, begun, done)
    if body.total is not None and done < body.total:
        raise FetchError(f"cut at byte {done} of {body.total}")


def _note(place: Place, file: BinaryIO, begun: dict[str, Any], synced: int) -> None:
    """Flush the part and write down of what it is one."""
    with _local(place.part):
        file.flush()
        os.fsync(file.fileno())
        content = begun | {"synced": synced, "boot": _boot()}
        write_atomic(place.begun, json.dumps(content).encode())


def _steady(chunks: Iterator[bytes], rules: Rules) -> Iterator[bytes]:
    """Pass the chunks on; a server that only trickles is left, as one that is silent."""
    waited, came = 0.0, 0
    while True:
        if rules.stop.is_set():
            raise Stopped
        began = time.monotonic()
        chunk = next(chunks, None)
        if chunk is None:
            return
        waited += time.monotonic() - began
        came += len(chunk)
        yield chunk
        if waited >= rules.silence_s:
            if came < waited * rules.least_bytes_per_s:
                raise FetchError(f"too slow: {came} bytes in {waited:.0f} s")
            waited, came = 0.0, 0


@contextmanager
def _local(path: Path) -> Iterator[None]:
    """Tell the errors of this machine from those of the server, which may be well again.

    Raises:
        FetchError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise FetchError(f"{path}: {error.strerror or error}", again=False) from error
