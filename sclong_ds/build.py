"""Set a training run up: check its inputs, build model and engine, open the run folder, resume.

`check_inputs` needs no process group; `build` is called by every rank. Reads the corpus, the gene
graph and the newest checkpoint; writes config.yaml, ds_config.json, genes.tsv, gene_graph.npz,
random_features.safetensors and run.json into the run folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

from kernels.favor_attention import triton_obstacle
from sclong_ds import checkpoint
from sclong_ds.checkpoint import TrainState
from sclong_ds.config import RunConfig
from sclong_ds.engine import (
    Ranks,
    build_partitioned,
    count_parameters,
    fill_master_weights,
    fill_parameters,
    initialize,
    on_first_rank,
    resolve_ds_config,
)
from sclong_ds.features_file import read_features
from sclong_ds.files import file_sha256, write_atomic
from sclong_ds.graph_file import read_gene_graph
from sclong_ds.initial_weights import InitialWeights, check_initial_model
from sclong_ds.model.sclong import ScLong
from sclong_ds.model_dir import FEATURES, GRAPH
from sclong_ds.objective import bin_labels
from sclong_ds.run_folder import update_run_json
from sclong_ds.signals import StopRequest, lock_run_folder
from sclong_ds.store import Corpus
from sclong_ds.strict_yaml import read_yaml, to_dict, to_yaml
from sclong_ds.tracking import Tracker

# The messages are part of the training log.
log = logging.getLogger("sclong_ds.pretrain")


@dataclass(slots=True)
class Run:
    """Everything a training run consists of; `state` is what changes from step to step."""

    config: RunConfig
    ranks: Ranks
    corpus: Corpus
    model: ScLong
    engine: Any
    tracker: Tracker
    stop: StopRequest
    state: TrainState
    run_dir: Path
    lock: IO[str] | None = None


def check_inputs(config: RunConfig) -> None:
    """Check what the command line must name, before any process group is joined.

    Raises:
        ValueError: A required setting is missing.
        FileNotFoundError: A named file or folder does not exist.
    """
    required = {
        "data.corpus": (config.data.corpus, "the folder that `python -m data_prep finalize` made"),
        "run.dir": (config.run.dir, "the run folder to make or to resume"),
    }
    if config.model.gene_encoder == "graph":
        made = (
            "the file that `python -m data_prep gene-graph` made (or model.gene_encoder=embedding)"
        )
        required["model.gene_graph"] = (config.model.gene_graph, made)
    for key, (value, meaning) in required.items():
        if value is None:
            raise ValueError(f"{key} is not set: add {key}=PATH, {meaning}")
    for key, path in {
        "model.gene_graph": config.model.gene_graph,
        "model.gene_vectors": config.model.gene_vectors,
        "model.random_features_file": config.model.random_features_file,
    }.items():
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"{key}={path}: no such file")
    if not Path(str(config.data.corpus)).is_dir():
        raise FileNotFoundError(f"data.corpus={config.data.corpus}: no such folder")


def refuse_changes(saved: Path, config: RunConfig) -> None:
    """Refuse to resume a run under another model or data section.

    Paths may change, their content may not.

    Raises:
        ValueError: What differs.
    """
    if not saved.is_file():
        return
    before, now = read_yaml(saved), to_dict(config)
    paths = {f"model.{key}" for key in ("gene_graph", "gene_vectors", "random_features_file")}
    paths.add("data.corpus")
    lines = [
        f"{section}.{key}: {before[section].get(key)!r} -> {value!r}"
        for section in ("model", "data")
        for key, value in now[section].items()
        if before[section].get(key) != value and f"{section}.{key}" not in paths
    ]
    if lines:
        raise ValueError(
            f"run.dir={saved.parent}: cannot resume with a changed configuration "
            f"({'; '.join(lines)}); undo the change or use a new run.dir"
        )


def check_same_on_all_ranks(config: RunConfig, state: TrainState, model: ScLong) -> None:
    """Check that all ranks read the same files and draw the same random features.

    Raises:
        ValueError: Which ranks differ from rank 0.
    """
    features = [
        performer.features(torch.device("cpu"))[0].numpy().tobytes()
        for performer in model.performers().values()
    ]
    settings = to_yaml(replace(config, run=replace(config.run, dir=None)))
    mine = hashlib.sha256(b"".join(features) + repr(state).encode() + settings.encode()).hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    different = [r for r, other in enumerate(everyone) if other != everyone[0]]
    if different:
        raise ValueError(
            f"ranks {different} have another configuration, corpus, gene graph or random features "
            f"than rank 0: check that all nodes see the same files and have the same library "
            f"versions"
        )


def summary(run: Run) -> dict[str, Any]:
    """Return what run.json says about the run, for the report."""
    return {
        "n_cells_train": len(run.corpus.split("train")),
        "n_cells_validation": len(run.corpus.split("validation")),
        "n_genes": len(run.corpus.genes),
        "n_datasets": len(run.corpus.datasets),
        "expression_bins": bin_labels(),
        "parameters": parameters_by_part(run.model),
        "corpus": str(Path(str(run.config.data.corpus)).resolve()),
        "world_size": run.ranks.world_size,
        "device": device_name(run.ranks.device),
        "ds_config": run.config.engine.ds_config,
    }


def parameters_by_part(model: ScLong) -> dict[str, int]:
    """Return the number of parameters of each part of the model."""
    return {name: count_parameters(part) for name, part in model.named_children()}


def device_name(device: torch.device) -> str:
    """Return the name of a device for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe(
    config: RunConfig, ranks: Ranks, corpus: Corpus, model: ScLong, ds_config: dict[str, Any]
) -> None:
    """Log at the start what will run."""
    e = config.engine
    log.info("configuration:\n%s", to_yaml(config).rstrip())
    log.info(
        "corpus: %d training cells, %d validation cells, %d genes, %d datasets",
        len(corpus.split("train")), len(corpus.split("validation")),
        len(corpus.genes), len(corpus.datasets),
    )  # fmt: skip
    parts = parameters_by_part(model)
    log.info(
        "parameters: %s (%s)",
        f"{sum(parts.values()):,}",
        ", ".join(f"{k} {v:,}" for k, v in parts.items()),
    )
    log.info(
        "batch: %d cells = %d a micro-batch x %d accumulation steps x %d ranks; "
        "ZeRO stage %d, %s, on %s",
        e.train_batch_size, e.train_micro_batch_size_per_gpu,
        ds_config["gradient_accumulation_steps"], ranks.world_size,
        ds_config["zero_optimization"]["stage"], e.precision, device_name(ranks.device),
    )  # fmt: skip
    log.info("attention: %s", attention_path(config, ranks, model))


def attention_path(config: RunConfig, ranks: Ranks, model: ScLong) -> str:
    """Return what computes the attention of this run, for people.

    Raises:
        ValueError: The backend that was asked for cannot run here.
    """
    if config.model.attention == "softmax":
        return "exact softmax"
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    obstacles = set()
    for performer in model.performers().values():
        q = torch.empty(1, 1, 1, performer.config.dim_head, dtype=dtype, device=ranks.device)
        features = performer.features(ranks.device)[0]
        obstacles.add(triton_obstacle(q, features, config.model.stabiliser_scope))
    reasons = "; ".join(sorted(reason for reason in obstacles if reason))
    backend = config.engine.attention_backend
    if backend == "triton" and reasons:
        raise ValueError(f"engine.attention_backend=triton: {reasons}; set it to auto or torch")
    if backend != "torch" and not reasons:
        return "FAVOR+, Triton kernels"
    return f"FAVOR+, plain torch ({reasons or 'as set'})"


def build(config: RunConfig, ranks: Ranks, stop: StopRequest, *, dry_run: bool) -> Run:
    """Build the model, the engine and the tracker, and go back to the newest checkpoint."""
    assert config.data.corpus is not None
    assert config.run.dir is not None
    run_dir = Path(config.run.dir)
    corpus = Corpus(config.data.corpus)
    if corpus.gene_stats.target_sum != config.data.target_sum:
        raise ValueError(
            f"data.target_sum: got {config.data.target_sum:g}, "
            f"the corpus statistics are for {corpus.gene_stats.target_sum:g}"
        )
    if not len(corpus.split("train")):
        raise ValueError(f"data.corpus={config.data.corpus}: its training split has no cells")
    ds_config = resolve_ds_config(config.engine, world_size=ranks.world_size)
    model = build_partitioned(
        lambda: make_model(config, corpus), seed=config.run.seed, ds_config=ds_config
    )
    for performer in model.performers().values():
        performer.recompute = config.engine.activation_checkpointing
        for layer in performer.layers:
            layer.attention.backend = config.engine.attention_backend
    weights = initial_weights(config, corpus, run_dir)
    if weights is not None:
        fill_parameters(model, weights)
    state = TrainState(
        step=0,
        cells_seen=0,
        world_size=ranks.world_size,
        seed=config.run.seed,
        precision=config.engine.precision,
        zero_stage=ds_config["zero_optimization"]["stage"],
        corpus_hash=corpus.hash,
        genes_hash=corpus.genes.hash,
        graph_hash=hash_of(config.model.gene_graph),
        features_hash=hash_of(config.model.random_features_file),
    )
    check_same_on_all_ranks(config, state, model)
    describe(config, ranks, corpus, model, ds_config)
    engine = initialize(model, optim=config.optim, ds_config=ds_config)
    if weights is not None and config.engine.precision == "bf16":
        fill_master_weights(model, weights)
    tracker = Tracker(config, run_dir, enabled=ranks.rank == 0)
    run = Run(config, ranks, corpus, model, engine, tracker, stop, state, run_dir)
    if not dry_run:
        open_run_folder(run, ds_config)
    return run


def hash_of(path: str | None) -> str | None:
    """Return the SHA-256 of an optional file."""
    return file_sha256(path) if path else None


def initial_weights(config: RunConfig, corpus: Corpus, run_dir: Path) -> InitialWeights | None:
    """Return the weights that a new run starts from, if not from random ones.

    Raises:
        ValueError: The model of `run.init_from` is not the run's.
    """
    if config.run.init_from is None:
        return None
    if on_first_rank(lambda: bool(checkpoint.complete_checkpoints(run_dir / "checkpoints"))):
        return None
    on_first_rank(lambda: check_initial_model(config, corpus.genes))
    log.info("weights: from %s", config.run.init_from)
    return InitialWeights(Path(config.run.init_from))


def read_gene_vectors(path: str) -> np.ndarray:
    """Return the initial gene vectors of an .npy file.

    Raises:
        ValueError: Not an .npy file of finite numbers.
    """
    try:
        vectors = np.load(path, allow_pickle=False)
        usable = bool(np.isfinite(vectors).all())
    except (ValueError, EOFError, TypeError) as error:
        raise ValueError(
            f"model.gene_vectors={path}: not an .npy file of numbers ({error})"
        ) from None
    if not usable:
        raise ValueError(
            f"model.gene_vectors={path}: holds NaN or inf; give genes without data zeros"
        )
    return vectors


def make_model(config: RunConfig, corpus: Corpus) -> ScLong:
    """Build the model for a corpus.

    Built from its genes, the gene graph, and the data's mean as the first prediction.
    """
    model, stats = config.model, corpus.gene_stats
    graph = (
        read_gene_graph(model.gene_graph, genes_hash=corpus.genes.hash)
        if model.gene_graph
        else None
    )
    vectors = read_gene_vectors(model.gene_vectors) if model.gene_vectors else None
    features = read_features(model.random_features_file) if model.random_features_file else None
    return ScLong(
        model,
        n_genes=len(corpus.genes),
        graph=graph,
        gene_vectors=vectors,
        features=features,
        output_mean=stats.mean_expressed if model.gene_bias else stats.mean_expressed_all,
    )


def open_run_folder(run: Run, ds_config: dict[str, Any]) -> None:
    """Lock the run folder, resume, write what the run consists of, start the tracker."""
    run_dir = run.run_dir
    on_first_rank(lambda: claim_run_folder(run))
    found = checkpoint.load(run.engine, run_dir / "checkpoints", expected=run.state)
    if found is not None:
        refuse_other_inputs(run, found)
        run.state = found
    on_first_rank(lambda: write_inputs(run, ds_config))
    run.tracker.start(
        params={"world_size": run.ranks.world_size, "parameters": count_parameters(run.model)},
        tags={
            "corpus_hash": run.state.corpus_hash,
            "genes_hash": run.state.genes_hash,
            "graph_hash": str(run.state.graph_hash),
        },
        artifacts=[run_dir / "config.yaml", run_dir / "ds_config.json"],
        resumed=found is not None,
    )
    if run.ranks.rank == 0:
        update_run_json(run_dir, summary=summary(run))
    run.tracker.event(
        "start" if found is None else "resume", step=run.state.step, world_size=run.ranks.world_size
    )
    log.info(
        "run folder %s: %s",
        run_dir,
        "new run" if found is None else f"resuming after step {found.step}",
    )


def claim_run_folder(run: Run) -> None:
    """Make the run folder and lock it; refuse one that holds another run's checkpoints."""
    checkpoints = run.run_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    run.lock = lock_run_folder(run.run_dir, wait_s=60)
    if checkpoint.complete_checkpoints(checkpoints):
        refuse_changes(run.run_dir / "config.yaml", run.config)


def refuse_other_inputs(run: Run, found: TrainState) -> None:
    """Refuse to resume on other cells, genes, graph or seed.

    Raises:
        ValueError: What differs.
    """
    names = ("seed", "corpus_hash", "genes_hash", "graph_hash", "features_hash")
    changed = [n for n in names if getattr(found, n) != getattr(run.state, n)]
    if changed:
        raise ValueError(
            f"run.dir={run.run_dir}: cannot resume, {', '.join(changed)} differ from the "
            f"checkpoint's; use the same corpus, gene graph, random features and run.seed, or a "
            f"new run.dir"
        )


def write_inputs(run: Run, ds_config: dict[str, Any]) -> None:
    """Write the resolved configuration and what the model consists of into the run folder."""
    write_atomic(run.run_dir / "config.yaml", to_yaml(run.config).encode())
    resolved = json.dumps(ds_config, indent=2) + "\n"
    write_atomic(run.run_dir / "ds_config.json", resolved.encode())
    run.corpus.genes.write(run.run_dir / "genes.tsv")
    model = run.config.model
    parts = {GRAPH: model.gene_graph, FEATURES: model.random_features_file}
    for name, path in parts.items():
        if path:
            write_atomic(run.run_dir / name, Path(path).read_bytes())
