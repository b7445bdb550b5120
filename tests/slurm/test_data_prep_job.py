"""data_prep.sh converts a manifest as a job array and finalizes the corpus; gene_graph.sh."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import run_module

from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.gene_graph import read_gene_graph

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "data_prep" / "resources" / "demo" / "manifest.tsv"
# The GO graph of all genes takes the longest of the jobs here.
GRAPH_TIMEOUT_S = 400.0


@pytest.fixture(scope="module")
def converted(slurm: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Convert the bundled cells in an array of two tasks whose numbers do not begin at 0."""
    corpus = tmp_path_factory.mktemp("data_prep_job") / "corpus"
    job = slurm.sbatch(
        "data_prep.sh", "convert", MANIFEST, "--out", corpus, options=("--array=3-4",)
    )
    return corpus, [slurm.wait(f"{job}_{task}") for task in (3, 4)]


def test_array_converts_every_dataset_once(converted: tuple[Path, list[Any]]) -> None:
    corpus, tasks = converted
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "status", corpus, "--json"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    datasets = {d["dataset_id"]: d["status"] for d in json.loads(done.stdout)["datasets"]}
    listed = [line.split("\t")[0] for line in MANIFEST.read_text().splitlines()[1:] if line]
    assert sorted(datasets) == sorted(listed)
    assert [name for name, status in datasets.items() if status != "ok"] == ["immune_broken"]
    # The task that had the broken file says so by its status; the other one is not affected.
    assert sorted((t.state, t.exit_code) for t in tasks) == [("COMPLETED", 0), ("FAILED", 1)]
    assert "task 0 of 2 on" in tasks[0].log
    assert "task 1 of 2 on" in tasks[1].log


def test_finalize_and_verify_run_as_jobs(slurm: Any, converted: tuple[Path, list[Any]]) -> None:
    corpus, _ = converted
    for command in ("finalize", "verify"):
        job = slurm.wait(slurm.sbatch("data_prep.sh", command, corpus))
        assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert len(Corpus(corpus)) > 0


# In front of python: SIGKILL to all processes of array task 1 when it has converted a dataset.
KILLED_ONCE = """#!/bin/bash
if [[ ${{SLURM_ARRAY_TASK_ID:-}} != 1 || -e {folder}/killed ]]; then exec {python} "${{@:2}}"; fi
touch {folder}/killed
set -m
{python} "${{@:2}}" &
until compgen -G "{folder}/corpus/ledger/odd*" >/dev/null; do sleep 0.01; done
kill -9 -- -$!
wait $!
"""


def test_a_killed_array_task_is_made_good_by_the_same_command(slurm: Any, tmp_path: Path) -> None:
    # Large and small files in turn, which go to tasks 0 and 1 in turn, the large ones first.
    names = ("even_0", "even_1", "odd_2", "odd_3", "even_4", "even_5", "odd_6", "odd_7")
    files = ("immune_a.h5ad", "immune_c.csv.gz") * 4
    rows = [f"{n}\t{MANIFEST.parent / f}" for n, f in zip(names, files, strict=True)]
    manifest, corpus = tmp_path / "manifest.tsv", tmp_path / "corpus"
    manifest.write_text("\n".join(["dataset_id\tpath", *rows]) + "\n")
    shim = tmp_path / "shim"
    shim.write_text(KILLED_ONCE.format(folder=tmp_path, python=sys.executable))
    shim.chmod(0o755)

    def convert() -> list[Any]:
        job = slurm.sbatch(
            "data_prep.sh", "convert", manifest, "--out", corpus,
            options=("--array=0-1",), env={"SCLONG_CONTAINER": str(shim)},
        )  # fmt: skip
        return [slurm.wait(f"{job}_{task}") for task in (0, 1)]

    first = convert()
    assert [(t.state, t.exit_code) for t in first] == [("COMPLETED", 0), ("FAILED", 137)]
    refused = slurm.wait(slurm.sbatch("data_prep.sh", "finalize", corpus))
    assert (refused.state, refused.exit_code) == ("FAILED", 1)
    assert "odd_7" in refused.log
    assert [(t.state, t.exit_code) for t in convert()] == [("COMPLETED", 0)] * 2
    job = slurm.sbatch("data_prep.sh", "finalize", corpus, options=("--array=0-2",))
    assert {slurm.wait(f"{job}_{task}").state for task in range(3)} == {"COMPLETED"}
    run_module("data_prep", "convert", manifest, "--out", tmp_path / "straight")
    run_module("data_prep", "finalize", tmp_path / "straight")
    assert Corpus(corpus).hash == Corpus(tmp_path / "straight").hash


@pytest.mark.parametrize(
    ("command", "array", "message"),
    [("convert", "0,2", "without gaps"), ("verify", "0-1", "'verify' runs as one job")],
)
def test_an_array_that_would_lose_datasets_is_refused(
    slurm: Any, tmp_path: Path, command: str, array: str, message: str
) -> None:
    corpus = tmp_path / "corpus"
    arguments = (MANIFEST, "--out", corpus) if command == "convert" else (corpus,)
    job = slurm.sbatch("data_prep.sh", command, *arguments, options=(f"--array={array}",))
    first = slurm.wait(f"{job}_0")
    assert (first.state, first.exit_code) == ("FAILED", 2)
    assert message in first.log
    assert not corpus.exists()


def test_gene_graph_job_writes_the_graph_of_the_given_genes(slurm: Any, tmp_path: Path) -> None:
    resources = ROOT / "data_prep" / "resources"
    out = tmp_path / "graph.npz"
    job = slurm.wait(
        slurm.sbatch(
            "gene_graph.sh",
            *("--obo", resources / "go" / "go-basic.obo.gz"),
            *("--associations", resources / "go" / "gene2go.gz"),
            *("--genes", resources / "genes_27874.tsv.gz"),
            *("--out", out),
        ),
        timeout_s=GRAPH_TIMEOUT_S,
    )
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    with np.load(out) as archive:
        genes_hash = str(archive["genes_hash"])
    edges, weights = read_gene_graph(out, genes_hash=genes_hash)
    assert edges.shape == (2, len(weights))
    assert edges.shape[1] > 27_874
