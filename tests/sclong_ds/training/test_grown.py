"""A run continues on its corpus with parts that came since, when it is asked to."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import pytest
from launching import ROOT, run_module, train

from sclong_ds.checkpoint.on_disk import complete_checkpoints
from sclong_ds.checkpoint.state import read_state
from sclong_ds.config.load import load_config
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.loader import open_stream
from sclong_ds.loader.weights import weights_of
from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.rows import read_metrics

pytestmark = pytest.mark.distributed
BATCH, BEFORE, STEPS = 4, 8, 14


def settings(run_dir: Path, corpus: Path, graph: Path, *more: str) -> list[object]:
    keys = {
        "run.dir": run_dir, "data.corpus": corpus, "model.gene_graph": graph,
        "model.top_seq_len": 64, "run.max_steps": STEPS, "run.validate_every_n_steps": 0,
        "run.validation_cells": 8, "checkpoint.every_n_steps": 4, "tracking.enabled": "false",
        "tracking.picture_cells": "null", "engine.train_batch_size": BATCH, "optim.decay_steps": 60,
    }  # fmt: skip
    return ["sclong_ds.pretrain", "--config", "sclong_tiny",
            *(f"{key}={value}" for key, value in keys.items()), *more]  # fmt: skip


@pytest.fixture(scope="module")
def grown(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus with a part of its own for one more dataset."""
    folder = tmp_path_factory.mktemp("grown")
    corpus = shutil.copytree(small_corpus, folder / "corpus")
    source = ROOT / "data_prep" / "resources" / "demo" / "immune_c.csv.gz"
    (folder / "manifest.tsv").write_text(f"dataset_id\tpath\nimmune_c\t{source}\n")
    run_module("data_prep", "convert", folder / "manifest.tsv", "--out", corpus,
               "--genes", small_corpus.parent / "genes.tsv", "--min-genes-mapped", 100,
               "--min-share-mapped", 0)  # fmt: skip
    run_module("data_prep", "finalize", corpus)
    return corpus


def cells_of_steps(run_dir: Path) -> dict[int, int]:
    return {
        int(row["step"]): int(row["data/cells_crc32"])
        for row in read_metrics(run_dir)
        if "data/cells_crc32" in row
    }


def test_a_run_continues_on_its_grown_corpus_when_asked(
    small_corpus: Path, small_graph: Path, grown: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_module(*settings(run_dir, small_corpus, small_graph, f"run.max_steps={BEFORE}"))
    begun = read_state(complete_checkpoints(run_dir / "checkpoints")[0])
    done = run_module(*settings(run_dir, grown, small_graph), check=False)
    assert done.returncode == 1
    (line,) = [t for t in done.stderr.splitlines() if "error:" in t]
    assert "parts came to the corpus since the checkpoint: add data.grown=true" in line
    done = run_module(*settings(run_dir, grown, small_graph, "data.grown=true"))
    corpus = Corpus(grown)
    state = read_state(complete_checkpoints(run_dir / "checkpoints")[0])
    assert (state.step, state.corpus_hash) == (STEPS, corpus.hash)
    assert (state.lanes, state.lanes_batch) == (begun.lanes, begun.lanes_batch)
    assert state.compared_after == BEFORE
    # From there on the order is that of the grown corpus, at the same position.
    seen = set()
    stream = open_stream(corpus, seed=state.seed, lanes=state.lanes, batch=state.lanes_batch)
    found = cells_of_steps(run_dir)
    for step in range(BEFORE + 1, STEPS + 1):
        rows = stream.between((step - 1) * BATCH, step * BATCH).rows
        assert found[step] == zlib.crc32(rows.astype("<i8").tobytes())
        seen |= {corpus.datasets[code].dataset_id for code in corpus.row_dataset[rows]}
    assert "immune_c" in seen
    (event,) = [e for e in read_events(run_dir) if e["event"] == "corpus_grown"]
    new = corpus.parts[1]
    assert (event["step"], event["parts"], event["datasets"]) == (BEFORE, 1, 1)
    assert event["train_cells"] == len(new.splits["train"])
    assert "data.grown: parts 1" in done.stderr
    report = tmp_path / "report.html"
    run_module("sclong_ds", "report", run_dir, "--out", report)
    assert "corpus_grown" in report.read_text()
    # Where nothing came since, the setting changes nothing.
    run_module(*settings(run_dir, grown, small_graph, f"run.max_steps={STEPS + 1}"))
    assert [e["event"] for e in read_events(run_dir)].count("corpus_grown") == 1
    done = run_module(*settings(run_dir, small_corpus, small_graph, "data.grown=true",
                                f"run.max_steps={STEPS + 2}"), check=False)  # fmt: skip
    assert done.returncode == 1
    assert "corpus_hash differ" in done.stderr


@pytest.mark.parametrize("balance", ["none", "dataset"])
def test_two_ranks_continue_on_the_grown_corpus_as_one_does(
    small_corpus: Path, small_graph: Path, grown: Path, tmp_path: Path, balance: str
) -> None:
    """Begun on two; both continue in the order of the grown corpus, and so does one alone."""
    more = ["engine.train_micro_batch_size_per_gpu=1"]
    if balance != "none":
        more += [f"data.balance_by={balance}", "data.balance_exponent=0.0", "data.max_repeats=3"]
    begun, log = tmp_path / "two", tmp_path / "log"
    train(["-m", *settings(begun, small_corpus, small_graph, f"run.max_steps={BEFORE}", *more)],
          n_ranks=2, log=log)  # fmt: skip
    one = shutil.copytree(begun, tmp_path / "one")
    found = {}
    for run_dir, ranks in ((begun, 2), (one, 1)):
        train(["-m", *settings(run_dir, grown, small_graph, "data.grown=true", *more)],
              n_ranks=ranks, log=log)  # fmt: skip
        found[ranks] = {
            int(row["step"]): (row["data/cells_crc32"], row["train/n_targets"], row["train/loss"])
            for row in read_metrics(run_dir)
            if "train/loss" in row
        }
        (event,) = [e for e in read_events(run_dir) if e["event"] == "corpus_grown"]
        assert (event["step"], event["parts"]) == (BEFORE, 1)
        state = read_state(complete_checkpoints(run_dir / "checkpoints")[0])
        assert (state.step, state.corpus_hash) == (STEPS, Corpus(grown).hash)
    assert [*found[1]] == [*found[2]] == [*range(1, STEPS + 1)]
    for step, (cells, targets, loss) in found[1].items():
        assert found[2][step][:2] == (cells, targets)
        assert found[2][step][2] == pytest.approx(loss, rel=1e-5)
    corpus = Corpus(grown)
    weights = weights_of(load_config("sclong_tiny", more).data, corpus)
    stream = open_stream(
        corpus, seed=state.seed, lanes=state.lanes, batch=state.lanes_batch, weights=weights
    )
    for step in range(BEFORE + 1, STEPS + 1):
        rows = stream.between((step - 1) * BATCH, step * BATCH).rows
        assert found[1][step][0] == zlib.crc32(rows.astype("<i8").tobytes())
