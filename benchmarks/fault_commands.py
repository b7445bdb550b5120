"""The commands that `benchmarks.faults` disturbs, and what must hold of them afterwards.

A command works in one folder, its place. `build` fills a new place with inputs and with what an
earlier run of the command left there; `run` is the command; `units` gives what a user sees of its
products, in parts that may change one by one: datasets of a staging, checkpoints of a run.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.damage import fresh_copy
from benchmarks.fault_products import (
    CELLS,
    FINISHED,
    contents,
    convert,
    data_prep,
    finalize,
    must,
    sclong,
)
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.engine.ranks import join_process_group
from sclong_ds.run_folder.rows import Judged

ABSENT: Mapping[str, Any] = {}
"""Content of a unit that is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command that is disturbed."""

    name: str
    """For instance finalize."""
    needs: tuple[str, ...]
    """Products that `build` takes from the folder of products."""
    build: Callable[[Path, Path], None]
    """Called with the folder of products and the place to fill."""
    run: Callable[[Path], int]
    """Called with the place; returns the exit status."""
    units: Callable[[Path], dict[str, Any]]
    """Called with the place; content of every unit that is there."""
    between: Callable[[Any], str] = lambda content: "third"
    """The state, of `benchmarks.disturbed.STATES`, of a unit that is neither old nor new."""


def _build_convert(products: Path, place: Path, *, datasets: slice = slice(None)) -> None:
    """Stage one or two datasets, then change the last of them; others were never staged.

    Args:
        products: Folder of the products.
        place: Folder to fill.
        datasets: Which of `CELLS` there are; the first two of them are staged.
    """
    sources = fresh_copy(products / "sources", place / "sources")
    manifest = sources / "manifest.tsv"
    lines = _only(manifest, datasets)
    manifest.write_text("".join(lines[:3]))
    must(convert(sources, place / "corpus"))
    manifest.write_text("".join(lines))
    changed = list(CELLS)[datasets][:2][-1]
    other = products / "other-sources" / f"{changed}.h5ad"
    (sources / other.name).write_bytes(other.read_bytes())


def _only(manifest: Path, datasets: slice) -> list[str]:
    """Return the first line of a manifest and those of some datasets; drop the other sources."""
    header, *lines = manifest.read_text().splitlines(keepends=True)
    for name in set(CELLS) - set(list(CELLS)[datasets]):
        manifest.with_name(f"{name}.h5ad").unlink()
    return [header, *lines[datasets]]


def _units_convert(place: Path) -> dict[str, Any]:
    """Return every dataset that has a ledger entry; without one its staging counts for nothing."""
    corpus = place / "corpus"
    found = {}
    for path in sorted((corpus / "ledger").glob("[!.]*.json")):
        entry = path.read_bytes()
        staged = contents(corpus / "staging" / path.stem)
        ok = json.loads(entry)["status"] == "ok"
        found[path.stem] = {"entry": entry} | (staged if ok else {})
    return found


def _failed(content: Any) -> str:
    """Return failed for a dataset whose entry is missing, which finalize refuses, or says so."""
    found = not content or json.loads(content["entry"])["status"] == "failed"
    return "failed" if found else "third"


def _build_finalize(products: Path, place: Path, *, datasets: slice = slice(None)) -> None:
    """Finish a corpus of all datasets but one, then stage that one too.

    Args:
        products: Folder of the products.
        place: Folder to fill.
        datasets: Which of `CELLS` there are.
    """
    sources = fresh_copy(products / "sources", place / "sources")
    manifest = sources / "manifest.tsv"
    lines = _only(manifest, datasets)
    manifest.write_text("".join(lines[:-1]))
    must(convert(sources, place / "corpus"))
    must(finalize(place / "corpus"))
    manifest.write_text("".join(lines))
    must(convert(sources, place / "corpus"))


def _units_finalize(place: Path) -> dict[str, Any]:
    """Return the corpus; without corpus.json there is none for any reader."""
    corpus = place / "corpus"
    if not (corpus / "corpus.json").exists():
        return {}
    files = contents(corpus)
    kept = (*FINISHED, "genes.tsv")
    return {"corpus": {name: files[name] for name in files if name.split("/")[0] in kept}}


def _build_export(products: Path, place: Path) -> None:
    fresh_copy(products / "run", place / "run")


def _build_embed(products: Path, place: Path) -> None:
    """Take a model, cells, and an embedding of other cells under the name to write."""
    fresh_copy(products / "model", place / "model")
    for name in ("skin", "blood"):
        source = products / "sources" / f"{name}.h5ad"
        (place / f"{name}.h5ad").write_bytes(source.read_bytes())
    must(_embed(place, "skin"))


def _embed(place: Path, cells: str) -> int:
    return sclong(
        "embed", place / "model", place / f"{cells}.h5ad", "--out", place / "out.h5ad",
        "--device", "cpu",
    )  # fmt: skip


def _build_vectors(products: Path, place: Path) -> None:
    fresh_copy(products / "corpus", place / "corpus")
    (place / "vectors.npy").write_bytes(b"old")


def _vectors(place: Path) -> int:
    out = place / "vectors.npy"
    return data_prep("gene-vectors", place / "corpus", "--dim", 8, "--out", out)


def _file_units(*names: str) -> Callable[[Path], dict[str, Any]]:
    """Return the units of a command that writes single files or folders."""

    def units(place: Path) -> dict[str, Any]:
        files = {name: place / name for name in names}
        found = {n: path.read_bytes() for n, path in files.items() if path.is_file()}
        return found | {n: contents(path) for n, path in files.items() if path.is_dir()}

    return units


_BESIDE = ("config.yaml", "genes.tsv")
"""Files of the run folder that a checkpoint cannot be without."""
_ENGINE: list[Any] = []
"""The engine that checkpoints are saved of; made once in the process that forks the trials."""


def _engine() -> Any:
    """Return a small ZeRO-3 engine of one rank after a step."""
    if _ENGINE:
        return _ENGINE[0]
    import dataclasses

    import torch
    from torch import nn

    from sclong_ds.config.load import load_config
    from sclong_ds.engine import deepspeed_engine as engines

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": "0"}  # fmt: skip
    engines.quiet_deepspeed()
    join_process_group(timeout_s=60)
    config = load_config("sclong_tiny")
    settings = dataclasses.replace(config.engine, train_batch_size=1, gradient_clipping=0.0)
    resolved = resolve_ds_config(settings, world_size=1)
    model = engines.build_partitioned(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), seed=0, ds_config=resolved
    )
    engine = engines.initialize(model, optim=config.optim, ds_config=resolved)
    loss = engine(torch.ones(1, 8)).square().mean()
    engine.backward(loss)
    engine.step()
    # The threads of the process group do not survive a fork, and one rank needs no other.
    torch.distributed.all_gather_object = lambda out, own, **_: out.__setitem__(0, own)
    for name in ("barrier", "all_reduce", "broadcast_object_list"):
        setattr(torch.distributed, name, lambda *_, **__: None)
    _ENGINE.append(engine)
    return engine


def _save(place: Path, step: int) -> int:
    """Save a checkpoint as training does, newest two kept, with a better figure each time."""
    import dataclasses

    from sclong_ds.checkpoint import save as checkpoint
    from sclong_ds.checkpoint.state import TrainState
    from sclong_ds.config.load import load_config

    config = load_config("sclong_tiny")
    state = TrainState(
        step=step, cells_seen=step, world_size=1, seed=0, precision="fp32", zero_stage=3,
        corpus_hash="", genes_hash="", graph_hash=None, features_hash=None,
    )  # fmt: skip
    keep = dataclasses.replace(config.checkpoint, keep_last=2, keep_best=True)
    try:
        saving = checkpoint.begin_save(
            _engine(), place / "checkpoints", state, files=[place / name for name in _BESIDE],
            settings=keep, by=Judged("val/mse", 1.0 / step), background=True,
        )  # fmt: skip
        checkpoint.finish_save(saving)
    except OSError as error:
        print(f"error: {error}", flush=True)
        return 1
    return 0


def _build_save(products: Path, place: Path) -> None:
    """Save two checkpoints; the next one drops the first."""
    del products
    (place / "checkpoints").mkdir(parents=True)
    for name in _BESIDE:
        (place / name).write_text(f"{name}\n")
    for step in (1, 2):
        must(_save(place, step))


def _units_save(place: Path) -> dict[str, Any]:
    """Return every checkpoint that a resumed run would look at, and the files beside them."""
    from sclong_ds.checkpoint.on_disk import complete_checkpoints

    folder = place / "checkpoints"
    found = {path.name: contents(path) for path in complete_checkpoints(folder)}
    beside = [folder / name for name in ("latest", "best.json") if (folder / name).exists()]
    return found | {path.name: path.read_bytes() for path in beside}


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(
            name="convert", needs=("staging",), build=_build_convert, units=_units_convert,
            run=lambda place: convert(place / "sources", place / "corpus"), between=_failed,
        ),
        Command(
            name="finalize", needs=("staging",), build=_build_finalize, units=_units_finalize,
            run=lambda place: finalize(place / "corpus"),
            between=lambda content: "third" if content else "killed",
        ),
        Command(
            name="convert-one", needs=("staging",), units=_units_convert, between=_failed,
            build=functools.partial(_build_convert, datasets=slice(1, 2)),
            run=lambda place: convert(place / "sources", place / "corpus"),
        ),
        Command(
            name="finalize-two", needs=("staging",), units=_units_finalize,
            build=functools.partial(_build_finalize, datasets=slice(2)),
            run=lambda place: finalize(place / "corpus"),
            between=lambda content: "third" if content else "killed",
        ),
        Command(
            name="save", needs=(), build=_build_save, units=_units_save,
            run=lambda place: _save(place, 3),
        ),
        Command(
            name="export", needs=("run",), build=_build_export, units=_file_units("model"),
            run=lambda place: sclong("export", place / "run", "--out", place / "model"),
        ),
        Command(
            name="embed", needs=("model",), build=_build_embed, units=_file_units("out.h5ad"),
            run=lambda place: _embed(place, "blood"),
        ),
        Command(
            name="gene-vectors", needs=("corpus",), build=_build_vectors,
            units=_file_units("vectors.npy"), run=_vectors,
        ),
    )
}  # fmt: skip
"""Name to command; of convert-one and finalize-two, every call can be tried in minutes."""
