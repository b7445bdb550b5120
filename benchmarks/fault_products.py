"""Tiny products of every kind, in two versions: what `benchmarks.faults` damages.

Four datasets of 20 to 60 cells over 300 genes become a staging, what a killed finalize leaves of
it, a corpus, a gene graph, a run of two ranks with two checkpoints, and a model. The second version
of each has the same files with other content: other counts, another order, other weights.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.damage import Product, fresh_copy

N_GENES = 300
CELLS = {"blood": 20, "liver": 32, "lung": 44, "skin": 60}
"""Datasets and their cells."""
FINISHED = ("cells.zarr", "obs", "columns", "corpus.json", "checksums.json",
            "gene_stats.npz", "measured_genes.npy")  # fmt: skip
"""What finalize adds to a corpus folder."""
WORK = ".finalize-*"
"""Pattern of the folder in which it works."""
BATCH = 8


def make_sources(folder: Path, *, seed: int) -> Path:
    """Write the datasets (h5ad, 10x mtx, text), a gene list and the manifest; return the manifest.

    Args:
        folder: Folder to make.
        seed: Of the counts.
    """
    import anndata
    import pandas as pd
    from scipy import sparse

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    genes = _genes()
    genes.write(folder / "genes.tsv")
    rng = np.random.default_rng(seed)
    lines = ["dataset_id\tpath\ttissue\tdonor_column"]
    for name, n_cells in CELLS.items():
        counts = rng.poisson(rng.lognormal(-1, 1.2, N_GENES), (n_cells, N_GENES))
        counts[0, 5], counts[1, 7] = 70_000, 300
        obs = pd.DataFrame(
            {"donor": [f"{name}_{i % 4}" for i in range(n_cells)],
             "cell_type": [f"type {i % 3}" for i in range(n_cells)]},
            index=[f"{name}_{seed}_{i}" for i in range(n_cells)],
        )  # fmt: skip
        cells = anndata.AnnData(
            sparse.csr_matrix(counts.astype(np.float32)), obs=obs,
            var=pd.DataFrame(index=list(genes.ids)),
        )  # fmt: skip
        cells.write_h5ad(folder / f"{name}.h5ad", compression="gzip")
        lines.append(f"{name}\t{name}.h5ad\t{name}\tdonor")
    manifest = folder / "manifest.tsv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def data_prep(*arguments: object) -> int:
    """Run `python -m data_prep` in this process; its workers are forked, not started."""
    from data_prep.__main__ import main

    # A worker that is started again does not have the handler of the command.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    fork = multiprocessing.get_context("fork")
    with mock.patch.object(multiprocessing, "get_context", return_value=fork):
        return main([str(argument) for argument in arguments])


def sclong(*arguments: object) -> int:
    """Run `python -m sclong_ds` in this process."""
    from sclong_ds.__main__ import main

    return main([str(argument) for argument in arguments])


@functools.cache
def _resolver() -> Any:
    """Return the resolver of the genes of all datasets; made before the trials are forked."""
    from data_prep.genes.gene_names import resolver_of

    resolver = resolver_of(_genes())
    resolver.read_name("no gene")
    return resolver


def _genes() -> Any:
    from sclong_ds.corpus.genes import GeneVocabulary

    bundled = GeneVocabulary.bundled()
    columns = (bundled.ids, bundled.symbols, bundled.classes)
    return GeneVocabulary(*(column[:N_GENES] for column in columns))


def convert(sources: Path, corpus: Path) -> int:
    """Stage the datasets of `make_sources`."""
    from data_prep.genes import gene_names

    with mock.patch.object(gene_names, "resolver_of", return_value=_resolver()):
        return _convert(sources, corpus)


def _convert(sources: Path, corpus: Path) -> int:
    return data_prep(
        "convert", sources / "manifest.tsv", "--out", corpus, "--genes", sources / "genes.tsv",
        "--min-genes-mapped", 10, "--min-genes", 1,
    )  # fmt: skip


def finalize(corpus: Path, *, seed: int = 0) -> int:
    """Finish a corpus; the same staging gives other cells at every place with another seed."""
    return data_prep("finalize", corpus, "--validation-fraction", 0.3, "--seed", seed)


def must(status: int) -> None:
    """Refuse to continue when a product could not be made."""
    if status:
        raise RuntimeError(f"a product could not be made: exit status {status}, see its log")


def make_staging(folder: Path) -> None:
    """Make FOLDER/staging and, from other counts, FOLDER/other-staging."""
    for name, seed in (("", 0), ("other-", 1)):
        make_sources(folder / f"{name}sources", seed=seed)
        must(convert(folder / f"{name}sources", folder / f"{name}staging"))


WORK_STAGES = ("plan", "join", "seal", "publish")
"""Stages of finalize at whose beginning it is killed; what is read later lies there then."""


def make_work(folder: Path, *, stage: str) -> None:
    """Make FOLDER/work-STAGE and FOLDER/other-work-STAGE: staging, and what a kill leaves of it.

    Args:
        folder: With the staging.
        stage: The stage that had not begun.
    """
    folders = []
    for prefix, seed in (("", 0), ("other-", 1)):
        corpus = fresh_copy(folder / "staging", folder / f"{prefix}work-{stage}")
        killed = multiprocessing.get_context("fork").Process(
            target=_killed_finalize, args=(corpus, seed, stage)
        )
        killed.start()
        killed.join()
        left = list(corpus.glob(WORK))
        if killed.exitcode != -signal.SIGKILL or len(left) != 1:
            raise RuntimeError(f"{corpus}: {killed.exitcode}, {left}")
        folders += left
    # Under the same names, one can stand for the other.
    os.rename(folders[1], folders[1].with_name(folders[0].name))


def _killed_finalize(corpus: Path, seed: int, stage: str) -> None:
    """Finalize a staging in a process that is killed when a stage begins, publish after seal."""
    from data_prep.corpus.finalize import finalize

    seen = []

    def progress(name: str, done: int, size: int) -> None:
        seen.append(name)
        if name == stage or (stage == "publish" and seen.count("seal") == 2):
            os.kill(os.getpid(), signal.SIGKILL)

    finalize(corpus, validation_fraction=0.3, seed=seed, progress=progress)


def make_corpus(folder: Path) -> None:
    """Make FOLDER/corpus and FOLDER/other-corpus from FOLDER/staging."""
    for name, seed in (("", 0), ("other-", 1)):
        must(finalize(fresh_copy(folder / "staging", folder / f"{name}corpus"), seed=seed))


def make_graph(folder: Path) -> None:
    """Make FOLDER/graph and FOLDER/other-graph, each with a gene graph and gene vectors."""
    from sclong_ds.corpus.gene_graph import write_gene_graph
    from sclong_ds.corpus.genes import GeneVocabulary

    genes = GeneVocabulary.read(folder / "corpus" / "genes.tsv")
    for name, seed in (("", 0), ("other-", 1)):
        target = folder / f"{name}graph"
        target.mkdir()
        rng = np.random.default_rng(seed)
        flat = np.unique(rng.integers(0, N_GENES**2, 2000))
        write_gene_graph(
            target / "graph.npz", np.stack([flat % N_GENES, flat // N_GENES]),
            rng.uniform(0.1, 1, len(flat)), n_genes=N_GENES, genes_hash=genes.hash,
            settings={"seed": seed}, counts={},
        )  # fmt: skip


def run_settings(folder: Path, run_dir: Path, *, seed: int) -> list[str]:
    """Return the arguments of `sclong_ds.pretrain` for the run of `make_run`."""
    small = "{depth: 1, heads: 2, dim_head: 4, nb_features: 8, ff_mult: 2}"
    settings = {
        "run.dir": run_dir, "data.corpus": folder / "corpus", "run.seed": seed,
        "model.gene_graph": folder / "graph" / "graph.npz", "data.shuffle_group_chunks": 2,
        "model.base_dim": 8, "model.large_dim": 16, "model.top_seq_len": 16,
        "model.expression_hidden": 4, "run.max_steps": 4, "engine.train_batch_size": 4,
        "run.validate_every_n_steps": 2, "run.validation_cells": 8, "optim.decay_steps": 4,
        "optim.warmup_steps": 1, "checkpoint.every_n_steps": 2, "checkpoint.keep_last": 3,
        "tracking.enabled": "false", "tracking.picture_cells": "null",
        "tracking.system_metrics_every_s": 0.5,
    }  # fmt: skip
    for stack in ("large_encoder", "mini_encoder", "decoder"):
        for item in small.strip("{}").split(", "):
            key, value = item.split(": ")
            settings[f"model.{stack}.{key}"] = value
    return ["--config", "sclong_tiny", *(f"{key}={value}" for key, value in settings.items())]


def make_run(folder: Path) -> None:
    """Train FOLDER/run and FOLDER/other-run on two ranks, two checkpoints each."""
    from tests.small_runs import train

    for name, seed in (("", 0), ("other-", 1)):
        run_dir = folder / f"{name}run"
        command = ["-m", "sclong_ds.pretrain", *run_settings(folder, run_dir, seed=seed)]
        train(command, n_ranks=2, log=folder / f"{name}run.log")
        _draw(run_dir, seed=seed)
        _end_job(run_dir, seed=seed)


def _draw(run_dir: Path, *, seed: int) -> None:
    """Add what stands for the pictures of the last validation; drawing them takes longer."""
    from sclong_ds.run_folder.pending_pictures import seal_pictures, show

    pictures = run_dir / "plots" / "step_00000004"
    pictures.mkdir(parents=True)
    for name in ("predicted_true", "ranks"):
        (pictures / f"{name}.png").write_bytes(f"{name} of {seed}".encode())
    seal_pictures(pictures)
    show(run_dir, pictures)


JOB = "77"
"""Slurm job of the runs."""


def _end_job(run_dir: Path, *, seed: int) -> None:
    """Add what a Slurm job that a rank ended leaves in the run folder."""
    from sclong_ds.files.sealed_json import write_sealed
    from sclong_ds.job import failures, restarts
    from sclong_ds.run_folder.seal import seal_again

    with mock.patch.dict(os.environ, SLURM_JOB_ID=JOB):
        restarts.begin(run_dir, job=JOB, nodes=f"n[{seed}-9]", max_stalled=3)
        problems = [{"nodes": [f"n{seed}"], "text": f"no GPU, seed {seed}"}]
        verdict = {"ok": False, "life": failures.start_id(), "problems": problems,
                   "bad_nodes": [f"n{seed}"]}  # fmt: skip
        write_sealed(run_dir / restarts.PREFLIGHT_FILE, verdict)
        seal_again(run_dir, restarts.PREFLIGHT_FILE)
        failures.record(run_dir, f"rank 1 (n{seed}): no such file")
        try:
            restarts.end(run_dir, 1, job=JOB, max_stalled=3)
        except ValueError:
            return
        raise RuntimeError("a job that a rank ended is started again")


def make_model(folder: Path) -> None:
    """Export FOLDER/model and FOLDER/other-model from the runs."""
    for name in ("", "other-"):
        must(sclong("export", folder / f"{name}run", "--out", folder / f"{name}model"))


MAKERS: dict[str, Callable[[Path], None]] = {
    "staging": make_staging,
    **{f"work-{stage}": functools.partial(make_work, stage=stage) for stage in WORK_STAGES},
    "corpus": make_corpus,
    "graph": make_graph,
    "run": make_run,
    "model": make_model,
}
"""Product to what makes it, in the order in which one needs the other."""


def product(folder: Path, name: str) -> Product:
    """Return a copy, to damage, of a product that `MAKERS` has made.

    Args:
        folder: Where the products are.
        name: Which one.
    """
    from benchmarks import fault_readers

    # Whoever is killed in the middle leaves the copy damaged, not the product.
    root = fresh_copy(folder / name, folder / "tried" / name)
    files = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and ".locks" not in path.parts and path.name != ".lock"
    )
    if name == "corpus":
        files = [file for file in files if file.split("/")[0] in (*FINISHED, "genes.tsv")]
    if name.startswith("work-"):
        files = [file for file in files if fnmatch(file.split("/")[0], WORK)]
    readers, must_fail = fault_readers.READERS[name]
    return Product(
        name=name, folder=root, other=folder / f"other-{name}", files=tuple(files),
        readers=readers, must_fail=must_fail, kind_of=kind_of,
        alone=name == "graph",
    )  # fmt: skip


def kind_of(file: str) -> str:
    """Return the kind of a file: datasets, steps and ranks are left out of its name."""
    name = file
    for dataset in CELLS:
        name = name.replace(dataset, "DATASET")
    name = re.sub(r"manifests/[0-9a-f]+", "manifests/HASH", name)
    name = re.sub(r"\.finalize-[0-9a-f]+", ".finalize-KEY", name)
    name = re.sub(r"\b\d{6}\b", "UNIT", name)
    name = re.sub(r"step_\d+", "step_N", name)
    name = re.sub(r"rank_\d+", "rank_R", name)
    name = re.sub(r"(system|heartbeat|ranks?)/[^/]+\.", r"\1/NODE.", name)
    return re.sub(r"/c/\d+$", "/c/N", name)


def remove(paths: Sequence[Path]) -> None:
    """Remove files and folders that may be missing."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def contents(folder: Path) -> dict[str, Any]:
    """Return the bytes of every file below a folder by name, and None for every folder.

    Args:
        folder: The folder; empty where it is missing.
    """
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
