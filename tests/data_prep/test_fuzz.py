"""Readers under fuzz: every format gives back what was written, and damage is never a wrong matrix.

What can be demanded of a damaged file depends on the format. gzip and zip carry checksums: the
result is an error or the original. HDF5, zarr and plain text carry none for the numbers themselves
(a flipped byte in an uncompressed value is a different, equally valid file), so there the result is
an error, the original, or exactly what an independent reader (anndata, h5py with scipy, or plain
Python) takes from the same bytes. Truncation is stricter: an error or the original, except that
tables in plain text may lose whole lines at the end, which nothing in them tells.

Damaged files are read in a process of their own, so that a crash or a hang of a C library is seen
as what it is. Examples are derived from the tests' source: the same ones in every run.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzed_formats import FORMATS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data_prep.readers import arrays as readers_arrays
from data_prep.readers import gather as readers_gather
from data_prep.readers import npz as readers_npz
from data_prep.readers import text as readers_text
from data_prep.readers.open import open_source
from data_prep.source import source

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60
MEMORY = 8 * 2**30
"""Address space of the reading process: a damaged size must not take the machine's memory."""


def gene_share(names: np.ndarray) -> float:
    return float(np.mean([str(name).startswith("G") for name in names]))


def read_ours(path: Path) -> tuple[np.ndarray, list[str]]:
    found = open_source(path, gene_share=gene_share).matrices[0]
    blocks = list(found.blocks())
    n_genes = found.shape[1]
    dense = [block.toarray() for block in blocks] or [np.zeros((0, n_genes))]
    genes = found.gene_columns
    name = next(key for key in ("index", "id", "genes", "column 1", "Gene") if key in genes)
    return np.concatenate(dense), list(genes[name])


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Cut everything so small that ten cells take several blocks, runs and buckets."""
    places = [(module, "BLOCK_ENTRIES", 7) for module in (source, readers_text, readers_npz)]
    places += [(readers_arrays, "BLOCK_ENTRIES", 7), (readers_arrays, "DENSE_ELEMENTS", 9)]
    places += [(readers_gather, "RUN_ENTRIES", 9), (readers_gather, "BUCKET_ENTRIES", 5)]
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in places:
            patch.setattr(module, name, value)
        yield


COUNTS = st.sampled_from([0, 0, 0, 0, 1, 1, 2, 255, 256, 65_535, 65_536, 2**31 - 1])
FLOATS = st.one_of(st.just(0.0), st.floats(2**-10, 2**20, allow_subnormal=False))
SHAPES = st.tuples(st.integers(1, 10), st.integers(1, 10))
MATRICES = st.one_of(
    arrays(np.int32, SHAPES, elements=COUNTS), arrays(np.float64, SHAPES, elements=FLOATS)
)


def deterministic(name: str) -> settings:
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        # A zarr folder takes ten times as long as a file.
        max_examples=8 if ".zarr" in name else 25,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.thorough
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    @deterministic(name)
    @given(values=MATRICES, small=st.booleans())
    def check(values: np.ndarray, small: bool) -> None:
        folder = tmp_path / "example"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = FORMATS[name][0](folder / name, values)
        with small_blocks() if small else contextlib.nullcontext():
            found, genes = read_ours(path)
        np.testing.assert_array_equal(found, values)
        assert genes == [f"G{i}" for i in range(values.shape[1])]

    check()


class Reader:
    """A process that reads files on request; a new one is started after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, path: Path, *, oracle: bool = False) -> dict[str, Any]:
        """Return values and genes, or error, or crash (also for no answer in time)."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))},
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(path), oracle]) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], TIMEOUT_S)
        line = process.stdout.readline() if ready else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        return {"crash": f"exit code {process.returncode}" if ready else "no answer in time"}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def serve() -> None:
    """Answer the requests of `Reader`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        place, oracle = json.loads(line)
        path = Path(place)
        other = FORMATS[path.name][1]
        read = other if oracle and other is not None else read_ours
        try:
            values, genes = read(path)
            answer: dict[str, Any] = {"values": values.tolist(), "genes": genes}
        # Whatever escapes is what the test wants to know.
        except Exception as error:  # noqa: BLE001
            answer = {"error": str(error), "type": [kind.__name__ for kind in type(error).mro()]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


def files_of(path: Path) -> list[Path]:
    """Return what of a dataset may be damaged; the plain gene list of an npz is only names."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def same(answer: dict[str, Any], other: dict[str, Any]) -> bool:
    if "values" not in answer or "values" not in other or answer["genes"] != other["genes"]:
        return False
    return np.array_equal(np.array(answer["values"]), np.array(other["values"]), equal_nan=True)


EXAMPLE = np.random.default_rng(1).poisson(0.8, (9, 7)).astype(np.int32) * 11


def judge(name: str, path: Path, reader: Reader, *, cut: bool) -> str:
    """Return an empty text if the answer to a damaged file is allowed, else what is wrong."""
    answer = reader.ask(path)
    if "crash" in answer:
        return f"the reader died: {answer['crash']}"
    if "error" in answer:
        allowed = {"ValueError", "FileNotFoundError", "OSError"} & set(answer["type"])
        text = answer["error"]
        one_line = path.name in text and "\n" not in text
        return "" if allowed and one_line else f"unexpected error {answer}"
    genes = [f"G{i}" for i in range(EXAMPLE.shape[1])]
    if same(answer, {"values": EXAMPLE.tolist(), "genes": genes}):
        return ""
    if cut and path.is_file() and path.suffix in (".csv", ".tsv"):
        found = np.array(answer["values"])
        whole = EXAMPLE[: found.shape[0], : found.shape[1]]
        return "" if np.array_equal(found, whole) else f"not whole lines: {found}"
    if FORMATS[name][1] is not None and not cut:
        other = reader.ask(path, oracle=True)
        if "UnicodeDecodeError" in other.get("type", ()):
            # Ours repairs a name; all but names is what was written.
            repaired = [
                a if "\ufffd" in b else b for a, b in zip(genes, answer["genes"], strict=True)
            ]
            other = {"values": EXAMPLE.tolist(), "genes": genes}
            answer = answer | {"genes": repaired}
        return "" if same(answer, other) else f"ours {answer}, the other reader {other}"
    return f"a wrong matrix: {answer}"


def damage(name: str, folder: Path, original: Path, place: int, xor: int | None) -> Path:
    """Return a copy with one byte changed, or cut there (xor None)."""
    target = folder / name
    for old in (target, folder / f"{target.stem}.genes.txt"):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    if original.is_dir():
        shutil.copytree(original, target)
    else:
        for file in original.parent.iterdir():
            shutil.copy(file, folder / file.name)
    files = files_of(target)
    sizes = np.cumsum([file.stat().st_size for file in files])
    place %= int(sizes[-1])
    number = int(np.searchsorted(sizes, place, side="right"))
    offset = place - int(sizes[number]) + files[number].stat().st_size
    data = bytearray(files[number].read_bytes())
    if xor is None:
        del data[offset:]
    else:
        data[offset] ^= xor
    files[number].write_bytes(data)
    return target


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_an_error_or_the_right_matrix(name: str, tmp_path: Path, reader: Reader) -> None:
    (tmp_path / "whole").mkdir()
    original = FORMATS[name][0](tmp_path / "whole" / name, EXAMPLE)
    folder = tmp_path / "damaged"
    folder.mkdir()

    @deterministic(name)
    @given(place=st.integers(0, 10**6), xor=st.one_of(st.none(), st.integers(0, 7), st.just(255)))
    def check(place: int, xor: int | None) -> None:
        flipped = xor if xor in (None, 255) else 1 << xor
        path = damage(name, folder, original, place, flipped)
        assert not judge(name, path, reader, cut=xor is None)

    check()


@pytest.mark.parametrize("name", ["cells.csv", "genes.tsv"])
def test_a_table_cut_anywhere_in_its_last_lines(name: str, tmp_path: Path, reader: Reader) -> None:
    original = FORMATS[name][0](tmp_path / name, EXAMPLE)
    data = original.read_bytes()
    for length in range(len(data) - 60, len(data)):
        original.write_bytes(data[:length])
        assert not judge(name, original, reader, cut=True), length


@pytest.mark.parametrize("name", ["csr.zarr", "csr_v3.zarr", "csc.zarr"])
def test_a_lost_file_of_a_zarr_folder_is_an_error_or_does_no_harm(
    name: str, tmp_path: Path, reader: Reader
) -> None:
    original = FORMATS[name][0](tmp_path / name, EXAMPLE)
    for file in files_of(original):
        data = file.read_bytes()
        file.unlink()
        # Not the other reader: zarr takes a chunk that is not there for zeros.
        assert not judge(name, original, reader, cut=True), file
        file.write_bytes(data)


if __name__ == "__main__":
    serve()
