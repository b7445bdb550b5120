"""Identity of a source: links are followed, and what they lead to is hashed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.convert import source_identity
from data_prep.convert.source_identity import source_files, source_hash


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder as data version control leaves it: links in the tree, content elsewhere."""
    for version in ("one", "two"):
        (tmp_path / "cache" / version).mkdir(parents=True)
        (tmp_path / "cache" / version / "0").write_text(f"chunk of {version}")
    (tmp_path / "cells.zarr").mkdir()
    (tmp_path / "cells.zarr/zarr.json").write_text("{}")
    return tmp_path


def test_content_behind_a_link_to_a_folder_is_hashed(store: Path) -> None:
    link = store / "cells.zarr/X"
    link.symlink_to(store / "cache/one")
    assert source_files(store / "cells.zarr") == [link / "0", store / "cells.zarr/zarr.json"]
    before = source_hash(store / "cells.zarr")
    (store / "cache/one/0").write_text("other")
    assert source_hash(store / "cells.zarr") != before
    link.unlink()
    link.symlink_to(store / "cache/two")
    assert source_hash(store / "cells.zarr") != before


def test_a_linked_tree_has_the_hash_of_the_same_tree_without_links(store: Path) -> None:
    (store / "cells.zarr/X").symlink_to(store / "cache/one")
    before = source_hash(store / "cells.zarr")
    (store / "cells.zarr/X").unlink()
    (store / "cells.zarr/X").mkdir()
    (store / "cells.zarr/X/0").write_text("chunk of one")
    assert source_hash(store / "cells.zarr") == before


def test_a_link_to_a_file_and_a_linked_dataset(store: Path) -> None:
    (store / "cells.zarr/X").symlink_to(store / "cache/one/0")
    (store / "linked.zarr").symlink_to(store / "cells.zarr")
    before = source_hash(store / "linked.zarr")
    assert before == source_hash(store / "cells.zarr")
    (store / "cache/one/0").write_text("other")
    assert source_hash(store / "linked.zarr") != before


def test_circles_of_links_end(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / "cells.zarr/up").symlink_to(store)
    (store / "cells.zarr/self").symlink_to(store / "cells.zarr")
    (store / "cells.zarr/nowhere").symlink_to(store / "missing")
    names = [str(file.relative_to(store)) for file in source_files(store / "cells.zarr")]
    linked = [f"cells.zarr/up/cache/{version}/0" for version in ("one", "two")]
    assert names == [*linked, "cells.zarr/zarr.json"]
    monkeypatch.setattr(source_identity, "MAX_FILES", 2)
    with pytest.raises(ValueError, match="holds more than 2 files; links in circles"):
        source_files(store / "cells.zarr")


def test_a_hash_is_remembered_for_files_that_have_come_to_rest(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store / "cells.zarr"
    state = source_identity.source_state(path)
    source_identity.remember_hash(store, "a", state, "just written")
    assert source_identity.remembered_hash(store, "a", state) is None
    assert not (store / ".seen").exists()
    monkeypatch.setattr(source_identity, "SETTLED_S", -1.0)
    source_identity.remember_hash(store, "a", state, "h")
    again = source_identity.source_state(path)
    assert source_identity.remembered_hash(store, "a", again) == "h"
    assert source_identity.remembered_hash(store, "b", again) is None
    # Same size, and the time put back: what was written to counts as another file.
    file = path / "zarr.json"
    before = file.stat()
    file.write_bytes(b"x" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source_identity.remembered_hash(store, "a", source_identity.source_state(path)) is None
    (store / ".seen" / "a.json").write_text("{")
    assert source_identity.remembered_hash(store, "a", again) is None


def test_the_hash_of_a_fetched_file_needs_no_second_look_at_it(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    path.write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    assert source_identity.fetched_hash(path, sha256) == source_hash(path)


@pytest.mark.parametrize("name", ["cells.npz", "cells.NPZ", "cells.dat"])
def test_the_gene_list_belongs_to_a_file_of_scipy_whatever_its_name(
    tmp_path: Path, name: str
) -> None:
    with (tmp_path / name).open("wb") as file:
        sparse.save_npz(file, sparse.csr_matrix(np.eye(2)))
    genes = tmp_path / "cells.genes.txt"
    genes.write_text("A\nB\n")
    assert source_files(tmp_path / name) == [tmp_path / name, genes]
    before = source_hash(tmp_path / name)
    genes.write_text("B\nA\n")
    assert source_hash(tmp_path / name) != before
