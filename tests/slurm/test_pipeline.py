"""pipeline.sh: from a manifest to a trained model in one chain of jobs; a failure ends it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import anndata
import pandas as pd
import pytest
from conftest import RESOURCES
from fault_server import entry, serving

from benchmarks.fetch_faults import Watch
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.run_folder.rows import read_metrics

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["convert", "finalize", "verify", "gene-graph", "pretrain"]
# The 300 genes of the small corpus.
SMALL = (
    "--config", "sclong_tiny", "model.top_seq_len=64", "model.large_encoder.depth=1",
    "engine.train_batch_size=2", "run.max_steps=2", "run.validation_cells=4",
    "tracking.enabled=false",
    "tracking.picture_cells=null",
)  # fmt: skip


def _submit(
    slurm: Any, source: tuple[str, str], out: Path, genes: Path, *options: str, convert: str = ""
) -> dict[str, str]:
    """Submit the chain and return its job ids by name."""
    convert = f"--genes {genes} --min-genes-mapped 100 --min-share-mapped 0 {convert}"
    logs = f"--output={slurm.folder}/jobs/%x-%j.out"
    text = slurm.command(
        "bash", "slurm/pipeline.sh", *source, "--out", str(out),
        "--convert", convert, "--finalize", "--validation-datasets immune_b",
        "--sbatch-prep", logs, "--sbatch-train", f"{logs} --nodes=2", *options, "--", *SMALL,
    )  # fmt: skip
    return dict(line.split("\t") for line in text.splitlines())


@pytest.mark.slurm
def test_the_chain_ends_with_a_trained_model(
    slurm: Any, small_corpus: Path, tmp_path: Path
) -> None:
    source = small_corpus.parent
    jobs = _submit(
        slurm, ("--manifest", str(source / "manifest.tsv")), tmp_path / "out",
        source / "genes.tsv", "--tasks", "2",
    )  # fmt: skip
    assert list(jobs) == NAMES
    trained = slurm.wait(jobs["pretrain"])
    assert (trained.state, trained.exit_code) == ("COMPLETED", 0), trained.log
    assert [
        row["step"] for row in read_metrics(tmp_path / "out" / "run") if "train/loss" in row
    ] == [
        1,
        2,
    ]
    assert {slurm.wait(jobs[name]).state for name in ("finalize", "verify", "gene-graph")} == {
        "COMPLETED"
    }


@pytest.mark.slurm
def test_public_datasets_become_a_model_on_a_disk_that_holds_few_of_them(
    slurm: Any, small_corpus: Path, tmp_path: Path
) -> None:
    """Four datasets of a listing, from a server that fails at first; one file a task on the disk.

    Of the fifth, of mice, and the sixth, a spatial one, nothing is asked for.
    """
    cells, names = anndata.read_h5ad(RESOURCES / "demo" / "immune_a.h5ad"), ["a", "b", "c"]
    cells.obs = pd.DataFrame(
        {"donor_id": "p1", "assay": "10x 3' v3", "cell_type": "T cell", "is_primary_data": True},
        index=cells.obs_names,
    )
    out, tasks = tmp_path / "out", 2
    with serving() as server:
        server.listing = [entry("mouse", organism=[{"label": "Mus musculus"}])]
        server.listing.append(entry("spots", assay=[{"label": "Visium Spatial Gene Expression"}]))
        for number, name in enumerate([*names, "immune_b"]):
            path = tmp_path / f"{name}.h5ad"
            cells[number::4].copy().write_h5ad(path)
            server.files[f"/{path.name}"] = path.read_bytes()
            size = path.stat().st_size
            asset = {"filetype": "H5AD", "filesize": size, "url": server.url(f"/{path.name}")}
            server.listing.append(entry(name, assets=[asset], title=f"Dataset {name}"))
        faults = {("/a.h5ad", 0): "503", ("/b.h5ad", 0): "cut", ("/c.h5ad", 0): "drop"}
        server.fault = lambda path, number: faults.get((path, number), "")
        most = max(map(len, server.files.values()))
        jobs = _submit(
            slurm,
            ("--from", f"cellxgene --organism human --listing {server.url('/datasets')}"),
            out, small_corpus.parent / "genes.tsv", "--tasks", str(tasks),
            convert=f"--keep-bytes {most}",
        )  # fmt: skip
        watch = Watch(out / "corpus" / ".sources")
        converted = [slurm.wait(f"{jobs['convert']}_{task}") for task in range(tasks)]
        assert {job.state for job in converted} == {"COMPLETED"}, [job.log for job in converted]
        trained = slurm.wait(jobs["pretrain"])
        on_disk = watch.stop()
    assert (trained.state, trained.exit_code) == ("COMPLETED", 0), trained.log
    assert {name for _, name in faults.items()} <= set(server.faults_made)
    assert not {"/mouse.h5ad", "/spots.h5ad"} & set(server.requests)
    assert 0 < on_disk <= tasks * most < sum(map(len, server.files.values()))
    assert not list((out / "corpus" / ".sources").glob("*.h5ad"))
    corpus = Corpus(out / "corpus")
    assert {d.dataset_id for d in corpus.datasets} == {*names, "immune_b"}
    assert len(corpus.splits["validation"]) > 0
    cited = (out / "corpus" / "CITATIONS.md").read_text()
    assert all(f"Dataset {name}" in cited for name in names)
    steps = [row["step"] for row in read_metrics(out / "run") if "train/loss" in row]
    assert steps == [1, 2]


@pytest.mark.slurm
def test_a_failed_conversion_ends_the_chain(slurm: Any, small_corpus: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.tsv"
    manifest.write_text("dataset_id\tpath\nabsent\tabsent.h5ad\n")
    genes = small_corpus.parent / "genes.tsv"
    jobs = _submit(slurm, ("--manifest", str(manifest)), tmp_path / "out", genes)
    assert slurm.wait(jobs["pretrain"]).state == "CANCELLED"
    assert slurm.wait(f"{jobs['convert']}_0").state == "FAILED"
    assert not (tmp_path / "out" / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out DIR and, after --"),
        (("--manifest",), "--manifest needs a value"),
        (
            ("--out", "o", "--manifest", "none.tsv", "--", "--config", "x"),
            "'none.tsv': no such file",
        ),
        (("--nodes", "2"), "unknown argument '--nodes'"),
        (
            ("--out", "o", "--manifest", "README.md", "--tasks", "0", "--", "--config", "x"),
            "--tasks 0: got no number above 0",
        ),
        (
            ("--out", "{tmp}/o", "--manifest", "README.md", "--", "run.seed=3", "--config", "x"),
            "--config x: no such preset or file",
        ),
    ],
)
def test_wrong_arguments_submit_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    done = subprocess.run(
        ["bash", "slurm/pipeline.sh", *given], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert not done.stdout


def test_a_refused_job_ends_the_submission_and_says_what_is_queued(tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        "#!/bin/bash\n"
        "if [[ $* == *sclong-verify* ]]; then echo 'sbatch: error: no' >&2; exit 1; fi\n"
        f"echo x >> {tmp_path}/calls; wc -l < {tmp_path}/calls\n"
    )
    sbatch.chmod(0o755)
    done = subprocess.run(
        ["bash", "slurm/pipeline.sh", "--manifest", "README.md", "--out", tmp_path / "out", "--",
         *SMALL],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == "convert\t1\nfinalize\t2\n"
    refused, message = done.stderr.splitlines()
    assert refused == "sbatch: error: no"
    assert message.startswith("error: Slurm refused the job of verify")
    assert set(message.split("scancel ")[1].split()) == {"1", "2"}


def test_the_list_of_public_datasets_is_made_and_pinned_before_the_chain(tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls; wc -l < {tmp_path}/calls\n')
    sbatch.chmod(0o755)
    (tmp_path / "list.txt").write_text("a\tfile:///data/a.h5ad\n")
    done = subprocess.run(
        ["bash", "slurm/pipeline.sh", "--from", f"{tmp_path}/list.txt", "--convert",
         "--keep-bytes 1GB", "--out", tmp_path / "out", "--", *SMALL],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == NAMES
    manifest = tmp_path / "out" / "sources" / "manifest.tsv"
    assert "a\tfile:///data/a.h5ad\t" in manifest.read_text()
    assert (manifest.parent / "fetch.lock.json").is_file()
    first = (tmp_path / "calls").read_text().splitlines()[0]
    assert f"convert {manifest} --out {tmp_path}/out/corpus --keep-bytes 1GB" in first
