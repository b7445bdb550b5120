"""Shared fixtures: the bundled cells as a finished corpus, the gene graph, and launching real runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESOURCES = ROOT / "data_prep" / "resources"
FAST_FIRST = ("kernels", "sclong_ds", "data_prep", "tests")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test somebody else's code: `kernels` is also a package on PyPI."""
    import kernels

    assert Path(kernels.__file__).is_relative_to(ROOT), f"kernels is {kernels.__file__}, not ours"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quick tests first, then those that launch ranks, then Slurm."""
    items.sort(
        key=lambda item: (
            bool(item.get_closest_marker("slurm")),
            bool(item.get_closest_marker("distributed")),
        )
    )


def run_module(
    *args: object, timeout: float = 600, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGS` from the checkout and return what it printed."""
    command = [sys.executable, "-m", *map(str, args)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    if check and done.returncode != 0:
        pytest.fail(
            f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        )
    return done


def environment() -> dict[str, str]:
    """Return the environment for child processes: CPU ranks with one thread each."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MLFLOW_"))}
    return inherited | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def deepspeed_command(ranks: int, *args: object) -> list[str]:
    """Return the command line that launches `python -m sclong_ds.pretrain ARGS` on some ranks."""
    launcher = Path(sys.executable).parent / "deepspeed"
    port = 20000 + os.getpid() % 20000
    return [
        str(launcher),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(port),
        "--module",
        "sclong_ds.pretrain",
        *map(str, args),
    ]


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 430 bundled cells, converted and finalized; immune_c is the validation split."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus"
    manifest = RESOURCES / "demo" / "manifest.tsv"
    done = run_module("data_prep", "convert", manifest, "--out", corpus, check=False)
    assert done.returncode == 1, done.stderr  # the broken file is reported
    run_module("data_prep", "finalize", corpus, "--validation-datasets", "immune_c")
    return corpus


@pytest.fixture(scope="session")
def demo_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gene graph of the bundled Gene Ontology."""
    graph = tmp_path_factory.mktemp("graph") / "graph.npz"
    run_module("data_prep", "gene-graph", "--out", graph)
    return graph


SMALL_GENES = 300


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real cells over the 300 genes with most counts; 126 cells (immune_b) are the validation split."""
    import anndata
    import numpy as np

    from sclong_ds.genes import GeneVocabulary

    folder = tmp_path_factory.mktemp("small")
    cells = anndata.read_h5ad(RESOURCES / "demo" / "immune_a.h5ad")
    totals = dict(zip(cells.var_names, np.asarray(cells.X.sum(axis=0)).ravel(), strict=True))
    bundled = GeneVocabulary.bundled()
    best = sorted(range(len(bundled)), key=lambda i: -totals.get(bundled.symbols[i], 0))[
        :SMALL_GENES
    ]
    keep = sorted(best)
    genes = GeneVocabulary(
        *(
            tuple(column[i] for i in keep)
            for column in (bundled.ids, bundled.symbols, bundled.classes)
        )
    )
    genes.write(folder / "genes.tsv")
    rows = [
        f"{name}\t{RESOURCES / 'demo' / name}.{kind}"
        for name, kind in (("immune_a", "h5ad"), ("immune_b", "h5"))
    ]
    (folder / "manifest.tsv").write_text("\n".join(["dataset_id\tpath", *rows]) + "\n")
    corpus = folder / "corpus"
    run_module("data_prep", "convert", folder / "manifest.tsv", "--out", corpus, "--genes", folder / "genes.tsv",
               "--min-genes-mapped", 100, "--min-share-mapped", 0)  # fmt: skip
    run_module("data_prep", "finalize", corpus, "--validation-datasets", "immune_b")
    return corpus


@pytest.fixture(scope="session")
def small_graph(small_corpus: Path) -> Path:
    """The gene graph of the small corpus."""
    graph = small_corpus.parent / "graph.npz"
    run_module("data_prep", "gene-graph", "--genes", small_corpus / "genes.tsv", "--out", graph)
    return graph
