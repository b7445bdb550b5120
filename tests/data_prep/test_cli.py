"""Command line: exit status, one JSON document on stdout, one line per error on stderr."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_prep.__main__ import COMMANDS, main
from data_prep.manifest.manifest import COLUMNS
from sclong_ds.corpus.genes import GeneVocabulary

GENES = GeneVocabulary.bundled()
ROOT = Path(__file__).parents[2]


def write(path: Path, seed: int, *, scale: float = 1) -> None:
    matrix = np.random.default_rng(seed).poisson(0.5, (20, 300)) * scale
    var = pd.DataFrame(index=list(GENES.ids[:300]))
    obs = pd.DataFrame(index=[f"{path.stem}{i}" for i in range(20)])
    anndata.AnnData(sparse.csr_matrix(matrix), obs=obs, var=var).write_h5ad(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two good datasets, one that is not counts and one that is text."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "good1.h5ad", 1)
    write(folder / "good2.h5ad", 2)
    write(folder / "scaled.h5ad", 3, scale=0.3)
    (folder / "text.h5ad").write_text("gene\tcell\nTP53\t1\n")
    names = ("good1", "good2", "scaled", "text")
    lines = [f"{name}\t{name}.h5ad\n" for name in names]
    (folder / "all.tsv").write_text("dataset_id\tpath\n" + "".join(lines))
    (folder / "good.tsv").write_text("dataset_id\tpath\n" + "".join(lines[:3]))
    return folder


def test_from_manifest_to_verified_corpus(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = str(tmp_path / "corpus")
    assert main(["convert", str(data / "good.tsv"), "--out", corpus, "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "3 datasets: 2 ok, 1 excluded, 0 failed; 40 cells"
    assert "is counts scaled by a factor per cell" in out
    assert main(["finalize", corpus, "--validation-datasets", "good2", "--json"]) == 0
    catalogue = json.loads(capsys.readouterr().out)
    assert catalogue["splits"]["train"] == [0, 20]
    assert catalogue["splits"]["validation"] == [20, 40]
    assert main(["finalize", corpus, "--validation-datasets", "good2"]) == 0
    assert "; 1 dataset left out (failed or excluded); hash" in capsys.readouterr().out
    assert main(["verify", corpus, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert main(["verify", corpus]) == 0
    assert "ok, 40 cells" in capsys.readouterr().out
    path = Path(corpus) / "genes.tsv"
    path.write_bytes(path.read_bytes().replace(b"TP53", b"TP54"))
    assert main(["verify", corpus]) == 1
    assert "genes.tsv" in capsys.readouterr().out


def test_a_failed_dataset_makes_the_exit_status_1_after_all_others(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = str(tmp_path / "corpus")
    assert main(["convert", str(data / "all.tsv"), "--out", corpus, "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["counts"] == {"ok": 2, "excluded": 1, "failed": 1}
    last = captured.err.splitlines()[-1]
    (failed,) = (entry for entry in report["datasets"] if entry["status"] == "failed")
    assert last.startswith(f"error: 1 of 4 datasets failed ({failed['dataset_id']}: ")
    assert main(["status", corpus, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["datasets"]
    statuses = {entry["dataset_id"]: entry["status"] for entry in listed}
    assert statuses == {"good1": "ok", "good2": "ok", "scaled": "excluded", "text": "failed"}
    assert all(entry["reason"] for entry in listed if entry["status"] != "ok")
    assert all(entry["n_cells"] == 20 for entry in listed if entry["status"] == "ok")
    assert main(["status", corpus]) == 0
    assert "text" in capsys.readouterr().out


def test_array_tasks_share_a_manifest(data: Path, tmp_path: Path) -> None:
    corpus, ledger = str(tmp_path / "corpus"), tmp_path / "corpus" / "ledger"
    command = ["convert", str(data / "good.tsv"), "--out", corpus, "--tasks", "2", "--task"]
    assert main([*command, "1"]) == 0
    # By size; how large each file is, is the writer's matter.
    of_one = set(os.listdir(ledger))
    assert main([*command, "0"]) == 0
    everything = {"good1.json", "good2.json", "scaled.json"}
    assert set(os.listdir(ledger)) == everything
    assert set() < of_one < everything


def test_a_folder_goes_on_with_the_genes_it_was_begun_with(data: Path, tmp_path: Path) -> None:
    """As a folder of an earlier version, whose bundled list was another one."""
    bundled, corpus = GeneVocabulary.bundled(), tmp_path / "corpus"
    columns = (bundled.ids, bundled.symbols, bundled.classes)
    earlier = GeneVocabulary(*(column[:-20] for column in columns))
    earlier.write(tmp_path / "earlier.tsv")
    command = ["convert", str(data / "good.tsv"), "--out", str(corpus)]
    assert main([*command, "--genes", str(tmp_path / "earlier.tsv")]) == 0
    assert main(command) == 0
    assert GeneVocabulary.read(corpus / "genes.tsv").hash == earlier.hash


def test_a_source_away_a_name_taken_and_a_dataset_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, manifest = str(tmp_path / "corpus"), tmp_path / "m.tsv"
    write(tmp_path / "a.h5ad", 1)
    manifest.write_text("dataset_id\tpath\na\ta.h5ad\n")
    command = ["convert", str(manifest), "--out", corpus]
    assert main(command) == 0
    (tmp_path / "a.h5ad").rename(tmp_path / "away.h5ad")
    capsys.readouterr()
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith("; 20 cells; 1 kept as staged (source not reachable)")
    assert "a: source not reachable, kept as staged (" in err
    write(tmp_path / "b.h5ad", 2)
    manifest.write_text("dataset_id\tpath\na\tb.h5ad\n")
    assert main(command) == 1
    assert "rename it in the manifest, or add --replace" in capsys.readouterr().err
    assert main([*command, "--replace"]) == 0
    assert main(["finalize", corpus]) == 0
    capsys.readouterr()
    assert main(["forget", corpus, "a"]) == 0
    assert "keeps its cells until the next finalize" in capsys.readouterr().out
    assert main(["verify", corpus]) == 0
    assert main(["forget", corpus, "a"]) == 1
    assert "no dataset 'a'" in capsys.readouterr().err


def test_more_tasks_than_datasets_is_no_error(data: Path, tmp_path: Path) -> None:
    command = ["convert", str(data / "good.tsv"), "--out", str(tmp_path / "c")]
    assert main([*command, "--task", "7", "--tasks", "8"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["convert"],
        ["convert", "m.tsv"],
        ["convert", "m.tsv", "--out", "c", "--task", "0"],
        ["convert", "m.tsv", "--out", "c", "--task", "2", "--tasks", "2"],
        ["convert", "m.tsv", "--out", "c", "--jobs", "0"],
        ["convert", "m.tsv", "--out", "c", "--min-share-mapped", "2"],
        ["convert", "m.tsv", "--out", "c", "--codec", "gzip"],
        ["convert", "m.tsv", "--out", "c", "--max-counts", "0"],
        ["convert", "m.tsv", "--out", "c", "--max-counts", "5", "--min-counts", "9"],
        ["convert", "m.tsv", "--out", "c", "--max-mito-fraction", "20"],
        ["convert", "m.tsv", "--out", "s3://bucket/c"],
        ["verify", "file:///c"],
        ["manifest"],
        ["forget", "c"],
        ["finalize", "c", "--split-by", "moon"],
        ["finalize", "c", "--seed", "-1"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "usage: python -m data_prep" in capsys.readouterr().out


def test_convert_help_documents_the_manifest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COLUMNS)


@pytest.mark.parametrize("command", ["status", "finalize", "verify"])
def test_a_folder_that_is_no_corpus_is_one_line(command: str, tmp_path: Path) -> None:
    """Run for real: the exit status and both streams are what a script sees."""
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", command, str(tmp_path / "nothing")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert "nothing" in done.stderr


def test_a_missing_manifest_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "no.tsv"), "--out", str(tmp_path / "c")]) == 1
    assert capsys.readouterr().err == f"error: manifest {tmp_path}/no.tsv: no such file\n"
    assert not (tmp_path / "c").exists()


def test_other_settings_on_the_same_corpus_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(data / "good.tsv"), "--out", str(tmp_path / "c")]
    assert main([*command, "--task", "7", "--tasks", "8"]) == 0
    capsys.readouterr()
    assert main([*command, "--min-genes", "5"]) == 1
    assert "min_genes the default there, 5 here" in capsys.readouterr().err
    assert main([*command, "--max-mito-fraction", "0.2"]) == 1
    assert "max_mito_fraction the default there, 0.2 here" in capsys.readouterr().err


def test_a_drafted_manifest_is_converted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "drafted.tsv"
    assert main(["manifest", str(data), "--out", str(manifest)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"{data}: 3 datasets of 60 cells to be read (1 will be excluded: see the column note), "
        "1 file not readable, 2 files without data\n"
    )
    assert main(["convert", str(manifest), "--out", str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"ok": 2, "excluded": 1, "failed": 0}
    before = manifest.read_bytes()
    assert main(["manifest", str(data), "--out", str(manifest), "--json"]) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert [dataset["n_cells"] for dataset in drafted["datasets"]] == [20, 20, 20]
    manifest.write_bytes(before + b"# edited\n")
    assert main(["manifest", str(data), "--out", str(manifest)]) == 1
    assert "exists with other content" in capsys.readouterr().err
    assert manifest.read_bytes() == before + b"# edited\n"


def test_a_folder_without_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", str(tmp_path)]) == 1
    assert "no dataset found" in capsys.readouterr().err.splitlines()[-1]
    assert main(["manifest", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/nothing: no such folder\n"
