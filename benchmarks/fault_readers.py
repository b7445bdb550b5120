"""The readers of every product: each returns all that it gives to its caller, to be compared.

A reader is one accessor on a product opened for it alone, so that the error of another one cannot
hide what it would have returned.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.damage import fresh_copy
from benchmarks.fault_products import (
    BATCH,
    FINISHED,
    JOB,
    WORK,
    WORK_STAGES,
    contents,
    remove,
)
from sclong_ds.checkpoint.load import _choose

Reader = Callable[[Path], Any]


def _corpus(accessor: Callable[[Any], Any]) -> Reader:
    """Return a reader that opens a corpus and calls one accessor."""

    def read(folder: Path) -> Any:
        from sclong_ds.corpus.corpus import Corpus

        return accessor(Corpus(folder))

    return read


def _arrays(value: Any) -> Any:
    """Return a dataclass or array as plain values that compare by content."""
    if hasattr(value, "__dataclass_fields__"):
        return [_arrays(getattr(value, name)) for name in value.__dataclass_fields__]
    return value.tobytes() if isinstance(value, np.ndarray) else repr(value)


def _packed(corpus: Any) -> Any:
    return [_arrays(corpus.read_packed(chunk)) for chunk in range(len(corpus.chunk_rows) - 1)]


def _measured(corpus: Any) -> Any:
    return _arrays(getattr(corpus, "measured_genes", None))


def _loader(corpus: Any) -> Any:
    """Return what the loader delivers in three steps."""
    from sclong_ds.loader.loader import CellLoader, open_stream

    stream = open_stream(corpus, seed=0, group_chunks=2)
    found = []
    with CellLoader(
        corpus, stream=stream, cells_seen=0, rank=0, world_size=1, train_batch_size=BATCH,
        micro_batch_size=BATCH, prefetch_batches=1, output="dense_norm", target_sum=1e4,
        stop_at=3 * BATCH,
    ) as loader:  # fmt: skip
        for step in loader:
            found.append(step.cell_ids.tobytes())
            found += [np.array(batch.counts).tobytes() for batch in step.micro_batches]
    return found


def read_verify(folder: Path) -> Any:
    """Verify a corpus; a report that is not ok is the error that the command would end with."""
    from data_prep.verify.verify import verify

    report = verify(folder)
    if not report["ok"]:
        raise ValueError("\n".join(report["problems"]))
    # What the chain was checked against may be named; what was found may not differ.
    return {name: report[name] for name in ("n_cells", "n_genes", "n_values", "splits", "hash")}


def read_finalized(folder: Path) -> Any:
    """Finalize a staging and return what is published; it must be what verify calls good."""
    from data_prep.corpus.finalize import finalize

    try:
        finalize(folder, validation_fraction=0.3)
        read_verify(folder)
        found = {name: reader(folder) for name, reader in CORPUS.items()}
        files = {n: c for n, c in contents(folder).items() if n.split("/")[0] in FINISHED}
        return found | {"files": files}
    finally:
        remove([*(folder / name for name in FINISHED), *folder.glob(WORK)])


def read_continued(folder: Path) -> Any:
    """Finalize a copy of a folder where a finalize was killed; return what is published."""
    with tempfile.TemporaryDirectory() as temporary:
        return read_finalized(fresh_copy(folder, Path(temporary) / folder.name))


CORPUS: dict[str, Reader] = {
    "rows": _corpus(lambda c: [_arrays(a) for a in vars(c.rows(np.arange(len(c)))).values()
                               if isinstance(a, np.ndarray)]),
    "read_packed": _corpus(_packed),
    # The catalogue alone cannot tell that the rest is of another corpus; two orders of the same
    # cells may share their chunk_rows, not their rows.
    "splits": _corpus(lambda c: (c.splits, c.hash, len(c), _arrays(np.asarray(c.row_source)))),
    "row_total": _corpus(lambda c: _arrays(np.asarray(c.row_total))),
    "row_nnz": _corpus(lambda c: _arrays(np.asarray(c.row_nnz))),
    "row_dataset": _corpus(lambda c: _arrays(np.asarray(c.row_dataset))),
    "row_source": _corpus(lambda c: _arrays(np.asarray(c.row_source))),
    "chunk_rows": _corpus(lambda c: _arrays(np.asarray(c.chunk_rows))),
    "obs": _corpus(lambda c: c.obs(np.arange(len(c))).to_csv()),
    "columns": _corpus(
        lambda c: {name: (v.values, v.terms, _arrays(v.codes())) for name, v in c.columns.items()}
    ),
    "genes": _corpus(lambda c: (c.genes.ids, c.genes.symbols, c.genes.classes)),
    "gene_stats": _corpus(lambda c: _arrays(c.gene_stats)),
    "datasets": _corpus(lambda c: (repr(c.datasets), _arrays(np.asarray(c.row_source)))),
    "measured_genes": _corpus(_measured),
    "loader": _corpus(_loader),
}  # fmt: skip
"""Accessors of a corpus."""


def read_graph(folder: Path) -> Any:
    """Read a gene graph as the model does."""
    from sclong_ds.corpus.gene_graph import read_gene_graph
    from sclong_ds.corpus.genes import GeneVocabulary

    genes = GeneVocabulary.read(folder.parents[1] / "corpus" / "genes.tsv")
    return [_arrays(a) for a in read_gene_graph(folder / "graph.npz", genes_hash=genes.hash)]


def read_status(folder: Path) -> Any:
    """Return what `status` shows, without ages that grow."""
    from sclong_ds.report.status import describe, read_status

    status = read_status(folder)
    ages = re.compile(r"\d+(\.\d+)? (s|min|h|days?) ago|\bfor \S+ \S+$", re.MULTILINE)
    return ages.sub("", describe(status))


def read_report(folder: Path) -> Any:
    """Return the page of `report` without the time it was written."""
    from sclong_ds.report.report import build_page
    from sclong_ds.tracking.client import find_runs

    return re.sub(r"Written [^<]*", "", build_page(find_runs([str(folder)])[0]))


def read_compare(folder: Path) -> Any:
    """Return what `compare` gives of the run and a copy of the other one."""
    from sclong_ds.report.compare import as_json
    from sclong_ds.tracking.client import find_runs

    return repr(as_json(find_runs([str(folder)])))


def read_resumed(folder: Path) -> Any:
    """Choose a checkpoint as a resumed run does and read all that is taken from it."""
    import torch.distributed as dist

    # A damaged checkpoint is renamed. DeepSpeed's own start would compile an extension.
    with tempfile.TemporaryDirectory() as temporary:
        store = dist.FileStore(f"{temporary}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        return _resumed(fresh_copy(folder, Path(temporary) / folder.name))


def _resumed(folder: Path) -> Any:
    from sclong_ds.checkpoint import on_disk as checkpoint_files
    from sclong_ds.checkpoint.state import read_state
    from sclong_ds.config.load import load_config
    from sclong_ds.run_folder import files as run_folder
    from sclong_ds.run_folder import identity as run_identity
    from sclong_ds.run_folder import seal
    from sclong_ds.training import run_checks

    checkpoints = folder / "checkpoints"
    name, problems = _choose(checkpoints)
    if name is None:
        raise FileNotFoundError(f"{checkpoints}: no checkpoint")
    if problems:
        raise ValueError("; ".join(problems))
    chosen = checkpoints / name
    config = load_config(chosen / "config.yaml")
    run_checks.refuse_changes(chosen, config)
    seal.say_changes(folder)
    checkpoint_files.restore_best(checkpoints)
    run_identity.take_over_ids(folder, chosen)
    best = checkpoint_files.best_checkpoint(checkpoints)
    files = {path.name: checkpoint_files.fingerprint(path) for path in sorted(chosen.glob("*.pt"))}
    state = read_state(chosen)
    run_folder.RunFolder(folder).close()
    return repr((name, state, config, best, run_folder.recorded_ids(folder), files))


def read_exported(folder: Path) -> Any:
    """Export the newest checkpoint and return the model's files."""
    from sclong_ds.exported.export import export

    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "model"
        export(folder, out)
        found = contents(out)
    # Says who exported, and the newest validation of the run folder.
    return {name: found[name] for name in found if name.endswith((".safetensors", ".tsv", ".npz"))}


def read_encoded(folder: Path) -> Any:
    """Load a model and encode two cells."""
    import torch

    import sclong_ds

    model = sclong_ds.load_model(folder)
    x = torch.log1p(torch.arange(2 * len(model.genes)).reshape(2, -1) % 7).float()
    with torch.inference_mode():
        values = [model(x).numpy().tobytes(), model.encode(x, genes="all").numpy().tobytes()]
    genes = (model.genes.ids, model.genes.symbols, model.genes.classes)
    return values, repr(model.transform), genes


def read_initial(folder: Path) -> Any:
    """Read a model as the start of a run."""
    from safetensors import safe_open

    from sclong_ds.exported.initial_weights import InitialWeights
    from sclong_ds.exported.manifest import WEIGHTS
    from sclong_ds.exported.model_dir import read_description

    described = read_description(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = sorted(file.keys())
    weights = InitialWeights(folder)
    return repr(described), {name: weights(name).numpy().tobytes() for name in names}


def read_job(folder: Path) -> Any:
    """Return what the next start of the run's Slurm job takes from the one that ended."""
    from sclong_ds.job import failures, restarts
    from sclong_ds.run_folder.seal import say_change

    start = f"{JOB}.0"
    names = (restarts.RESTARTS_FILE, restarts.PREFLIGHT_FILE, failures.FAILURE_FILE)
    say_change(folder, *names)
    starts = restarts.read_starts(folder)
    verdict = restarts.read_verdict(folder, start=start)
    return repr((starts, verdict, failures.read_failure(folder, start=start)))


RUN: dict[str, Reader] = {
    "status": read_status,
    "job": read_job,
    "report": read_report,
    "compare": read_compare,
    "resume": read_resumed,
    "export": read_exported,
}
"""Commands that read a run folder."""
MODEL: dict[str, Reader] = {"load_model": read_encoded, "init_from": read_initial}
"""What reads a model folder."""
READERS: dict[str, tuple[dict[str, Reader], tuple[str, ...]]] = {
    "staging": ({"finalize": read_finalized}, ()),
    **{f"work-{stage}": ({"finalize": read_continued}, ()) for stage in WORK_STAGES},
    "corpus": (CORPUS | {"verify": read_verify}, ("verify",)),
    "run": (RUN, ()),
    "model": (MODEL, ()),
    "graph": ({"read_gene_graph": read_graph}, ()),
}
"""Product to its readers, and those that must reject every change."""
