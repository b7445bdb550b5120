"""pipeline.sh: from a manifest to a trained model in one chain of jobs; a failure ends it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

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


def _submit(slurm: Any, manifest: Path, out: Path, genes: Path, *options: str) -> dict[str, str]:
    """Submit the chain and return its job ids by name."""
    convert = f"--genes {genes} --min-genes-mapped 100 --min-share-mapped 0"
    logs = f"--output={slurm.folder}/jobs/%x-%j.out"
    text = slurm.command(
        "bash", "slurm/pipeline.sh", "--manifest", str(manifest), "--out", str(out),
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
        slurm, source / "manifest.tsv", tmp_path / "out", source / "genes.tsv", "--tasks", "2"
    )
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
def test_a_failed_conversion_ends_the_chain(slurm: Any, small_corpus: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.tsv"
    manifest.write_text("dataset_id\tpath\nabsent\tabsent.h5ad\n")
    jobs = _submit(slurm, manifest, tmp_path / "out", small_corpus.parent / "genes.tsv")
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
