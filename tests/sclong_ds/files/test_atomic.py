import errno
import fcntl
import multiprocessing
import os
import pathlib
import re
import signal
import threading
import time

import pytest

from sclong_ds.files.atomic import (
    Lock,
    NoLocksError,
    files_below,
    is_partial,
    link_or_copy,
    locked,
    partial_name,
    remove_partials,
    remove_partials_of,
    whole_file,
    write_atomic,
)
from sclong_ds.files.sealed_json import read_object


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "a.json", b"{}")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == mode


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failing_block_leaves_the_old_file_and_nothing_else(tmp_path):
    with whole_file(tmp_path / "a") as partial:
        partial.write_text("old")
        assert not (tmp_path / "a").exists()
        assert is_partial(partial)
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a") as partial:  # noqa: PT012
        partial.write_text("new")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def _killed_while_writing(path):
    os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
    write_atomic(path, b"x" * 100)


def test_what_a_kill_leaves_is_told_from_products_and_removed(tmp_path):
    name = "n" * 255
    write_atomic(tmp_path / name, b"old")
    process = multiprocessing.get_context("fork").Process(
        target=_killed_while_writing, args=(tmp_path / name,)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = {path for path in tmp_path.iterdir() if is_partial(path)}
    assert len(left) == 1
    assert not is_partial(tmp_path / name)
    remove_partials(tmp_path)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["я" * 122 + ".h", "a" * 255, "細" * 85])
def test_any_name_that_the_disk_takes_can_be_written(tmp_path, name):
    """255 bytes are the limit, and a letter may have several."""
    write_atomic(tmp_path / name, b"old")
    partial_name(tmp_path / name).write_bytes(b"left by a kill")
    remove_partials_of(tmp_path / name)
    write_atomic(tmp_path / name, b"new")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"new"


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    assert files_below(tmp_path) == [tmp_path / "a" / "b" / "file", tmp_path / "link"]
    assert files_below(tmp_path / "missing") == files_below(tmp_path / "link") == []
    real = os.scandir

    def scandir(path):
        if pathlib.Path(path).name == "b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/a/b'"):
        files_below(tmp_path)


def test_partial_names_differ_and_keep_the_folder(tmp_path):
    first, second = (partial_name(tmp_path / "x.npz") for _ in range(2))
    assert first != second
    assert first.parent == tmp_path
    assert is_partial(first)
    assert not any(is_partial(name) for name in ("x.partial", ".x.partial", "step_1.partial"))


def _try(path, shared, pipe):
    with locked(path, shared=shared, wait=False) as held:
        pipe.send(held)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_shared_locks_go_together_and_exclusive_ones_do_not(tmp_path, first, second, expected):
    ours, theirs = multiprocessing.Pipe()
    path = tmp_path / "new" / "lock"
    with locked(path, shared=first) as held:
        assert held
        process = multiprocessing.get_context("fork").Process(
            target=_try, args=(path, second, theirs)
        )
        process.start()
        process.join()
        assert ours.recv() is expected
    with locked(path, wait=False) as held:
        assert held


def test_a_lock_waits_as_long_as_it_is_told_and_names_its_holder(tmp_path):
    path = tmp_path / "lock"
    with Lock(path) as first, Lock(path) as second:
        assert second.take(wait_s=0)
        second.sign()
        began = time.monotonic()
        assert not first.take(wait_s=0.3)
        assert time.monotonic() - began >= 0.3
        assert first.note == f"process {os.getpid()} on {os.uname().nodename}"
        threading.Timer(0.3, second.release).start()
        assert first.take(wait_s=600)
        first.note = "short"
    with Lock(path) as third:
        assert third.note == "short"
        assert third.take(shared=True, wait_s=0)


def test_without_locks_a_process_is_told_or_warned(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "lock"
    with Lock(path) as lock, pytest.raises(NoLocksError, match=f"'{path}'"):
        lock.take()
    with locked(path, wait=False) as held:
        assert held
    assert f"{tmp_path}: this file system has no locks" in caplog.text


def _manifest(path):
    from data_prep.manifest.manifest import read_manifest

    return read_manifest(path)


def _ledger_entry(path):
    from data_prep.ledger.ledger import read_entry

    return read_entry(path)


@pytest.mark.parametrize("reader", [_manifest, _ledger_entry, read_object])
def test_a_disk_that_fails_while_a_file_is_read_is_named(tmp_path, monkeypatch, reader):
    path = tmp_path / "some.json"
    path.write_text("{}")

    def damaged(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pathlib.Path, "read_bytes", damaged)
    with pytest.raises(OSError, match=re.escape(f"Input/output error: '{path}'")):
        reader(path)


@pytest.mark.parametrize("kind", [errno.EPERM, errno.EINVAL, errno.EIO, errno.EROFS, errno.ENOSPC])
def test_a_file_is_copied_where_the_file_system_has_no_links(tmp_path, monkeypatch, kind):
    def link(*_):
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "a").write_bytes(b"x")
    if kind in (errno.EROFS, errno.ENOSPC):
        with pytest.raises(OSError, match=os.strerror(kind)):
            link_or_copy(tmp_path / "a", tmp_path / "b")
        assert not (tmp_path / "b").exists()
    else:
        link_or_copy(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == b"x"
