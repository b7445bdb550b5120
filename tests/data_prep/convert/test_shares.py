"""Who converts what: even shares, the same for all tasks, and large files by row ranges."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from data_prep.convert import shares
from data_prep.convert.shares import in_places, shared_out, shares_of, size_of, units_of
from data_prep.manifest.manifest import Dataset
from sclong_ds.corpus.genes import GeneVocabulary

ROOT = Path(__file__).parents[3]
GENES = GeneVocabulary.bundled()


def made(sizes: list[int]) -> list[Dataset]:
    return [Dataset(dataset_id=f"d{i}", path=Path(f"d{i}.h5ad")) for i in range(len(sizes))]


@given(
    sizes=st.lists(st.integers(0, 10**11), min_size=1, max_size=60),
    tasks=st.integers(1, 20),
    jobs=st.integers(1, 4),
)
def test_every_row_is_somebodys_and_the_shares_are_even(
    sizes: list[int], tasks: int, jobs: int
) -> None:
    units = units_of(made(sizes), sizes, slots=tasks * jobs)
    parts: dict[str, list[tuple[int, int]]] = {}
    for share in shared_out(units, tasks=tasks):
        assert [u.size for u in share] == sorted((u.size for u in share), reverse=True)
        for unit in share:
            number, of = (unit.piece.number, unit.piece.of) if unit.piece else (0, 1)
            parts.setdefault(unit.dataset.dataset_id, []).append((number, of))
    assert parts.keys() == {d.dataset_id for d in made(sizes)}
    for found in parts.values():
        assert sorted(number for number, _ in found) == list(range(found[0][1]))
        assert found[0][1] <= shares.MOST_PIECES
    loads = [sum(u.size for u in share) for share in shared_out(units, tasks=tasks)]
    # Graham's bound for the longest first.
    least = max(sum(u.size for u in units) / tasks, max(u.size for u in units))
    assert max(loads) <= 2 * least
    places = in_places(shared_out(units, tasks=tasks))
    assert sorted(filter(None, places)) == sorted(parts)
    for place, name in enumerate(places):
        if name is not None:
            share = shared_out(units, tasks=tasks)[place % tasks]
            assert name in {u.dataset.dataset_id for u in share}


def test_no_file_below_the_least_size_is_cut_and_none_of_another_format() -> None:
    large = shares.LEAST_PIECE_BYTES * 8
    datasets = [
        Dataset(dataset_id="cut", path=Path("a.h5ad")),
        Dataset(dataset_id="text", path=Path("b.csv")),
        Dataset(dataset_id="far", path=Path("far"), url="https://x/c.h5ad", remote=True),
    ]
    units = units_of(datasets, [large] * 3, slots=8)
    assert [u.dataset.dataset_id for u in units if u.piece] == ["cut"] * 8
    assert not any(u.piece for u in units_of(datasets, [large] * 3, slots=1))
    assert not any(u.piece for u in units_of(datasets, [large // 8] * 3, slots=8))


def test_all_tasks_go_by_the_sizes_that_the_first_one_saw(tmp_path: Path) -> None:
    datasets = []
    for number in range(6):
        path = tmp_path / f"d{number}.h5ad"
        path.write_bytes(b"x" * (10 - number))
        datasets.append(Dataset(dataset_id=path.stem, path=path))
    first = shares_of(tmp_path, datasets, tasks=2, jobs=1)
    datasets[5].path.write_bytes(b"x" * 1000)
    datasets[0].path.unlink()
    assert shares_of(tmp_path, datasets, tasks=2, jobs=3) == first
    assert shares_of(tmp_path, datasets, tasks=3, jobs=1)[0][0].dataset.dataset_id == "d5"
    assert size_of(datasets[0]) == 0
    (tmp_path / "folder.zarr" / "X").mkdir(parents=True)
    (tmp_path / "folder.zarr" / "X" / "0").write_bytes(b"12345")
    assert size_of(Dataset(dataset_id="z", path=tmp_path / "folder.zarr")) == 5
    for path in (tmp_path / ".shares").iterdir():
        path.write_text("[1")
    assert shares_of(tmp_path, datasets, tasks=2, jobs=1) != first


def content(corpus: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(corpus)): path.read_bytes()
        for part in ("ledger", "staging")
        for path in sorted((corpus / part).rglob("*"))
        if path.is_file()
    }


def start(folder: Path, out: str, task: int, tasks: int) -> subprocess.Popen[bytes]:
    """Begin a task for which a file of 20 kB is large, in a process group of its own."""
    code = (
        "import sys; from data_prep.convert import shares; shares.LEAST_PIECE_BYTES = 20_000; "
        "from data_prep.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", str(folder / "m.tsv"), "--out", folder / out]
    command += ["--min-genes", "20", "--min-genes-mapped", "100"]
    command += ["--task", str(task), "--tasks", str(tasks)] if tasks > 1 else []
    with (folder / f"{out}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log, start_new_session=True)


@pytest.mark.parametrize("seed", range(2))
def test_tasks_that_are_killed_at_random_give_the_bytes_of_one_that_is_not(
    tmp_path: Path, seed: int
) -> None:
    """One large dataset, in which each task has pieces, and small ones, of which one is damaged."""
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    rows = ["dataset_id\tpath"]
    for name, n_cells in (("large", 9000), ("small", 300), ("other", 200)):
        counts = sparse.csr_matrix(rng.poisson(0.3, (n_cells, 300)).astype(np.float32))
        cells = anndata.AnnData(counts)
        cells.var_names = list(GENES.ids[:300])
        cells.obs_names = [f"{name}{i}" for i in range(n_cells)]
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
        rows.append(f"{name}\t{name}.h5ad")
    (tmp_path / "bad.h5ad").write_bytes(b"no file of HDF5")
    (tmp_path / "m.tsv").write_text("\n".join([*rows, "bad\tbad.h5ad"]) + "\n")
    assert start(tmp_path, "straight", 0, 1).wait() == 1
    tasks = 3
    for _ in range(4):
        running = [start(tmp_path, "killed", task, tasks) for task in range(tasks)]
        time.sleep(draw.uniform(1.0, 9.0))
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    running = [start(tmp_path, "killed", task, tasks) for task in range(tasks)]
    assert sorted(process.wait() for process in running) == [0, 0, 1]
    # Workers of a killed command end by themselves, and give their locks back.
    if content(tmp_path / "killed") != content(tmp_path / "straight"):
        running = [start(tmp_path, "killed", task, tasks) for task in range(tasks)]
        assert sorted(process.wait() for process in running) == [0, 0, 1]
    assert content(tmp_path / "killed") == content(tmp_path / "straight")
    assert not list((tmp_path / "killed" / ".pieces").iterdir())
