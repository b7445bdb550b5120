"""Set a training run up: build model and engine, open the run folder, resume.

Every rank calls `build`. Reads the corpus, the gene
graph and the newest checkpoint; writes config.yaml, ds_config.json, genes.tsv, gene_graph.npz,
random_features.safetensors and run.json into the run folder.
"""

from __future__ import annotations

import json
import logging
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from kernels.favor_attention import triton_obstacle
from sclong_ds.checkpoint.load import Loaded, load
from sclong_ds.checkpoint.on_disk import TrainState, complete_checkpoints, restore_best
from sclong_ds.checkpoint.save import Saving
from sclong_ds.config.sections import RunConfig
from sclong_ds.config.strict_yaml import to_yaml
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.gene_graph import read_gene_graph
from sclong_ds.engine.deepspeed_engine import (
    build_partitioned,
    count_parameters,
    fill_master_weights,
    fill_parameters,
    initialize,
)
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.engine.gradient_norms import GradientNorms
from sclong_ds.engine.ranks import Ranks, on_first_rank
from sclong_ds.engine.schedule import learning_rate
from sclong_ds.exported.initial_weights import InitialWeights, check_initial_model
from sclong_ds.exported.model_dir import FEATURES, GRAPH
from sclong_ds.files.atomic import file_sha256, write_atomic
from sclong_ds.guards import StepGuard, history_of
from sclong_ds.model.random_features import read_features
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.measured import MeasuredGenes
from sclong_ds.objective.metrics import bin_labels
from sclong_ds.objective.targets import target_count
from sclong_ds.planning.costs import training_flops_per_cell
from sclong_ds.planning.devices import device_of_name
from sclong_ds.rank_times import RankTimes
from sclong_ds.run_checks import (
    check_run_folder,
    check_same_on_all_ranks,
    refuse_changes,
    refuse_other_inputs,
)
from sclong_ds.run_folder.identity import node_name, take_over_ids
from sclong_ds.run_folder.lock import lock_run_folder
from sclong_ds.run_folder.rows import read_metrics
from sclong_ds.signals import StopRequest
from sclong_ds.tracking.tracker import Tracker
from sclong_ds.watchdog import Watchdog

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
    watchdog: Watchdog
    guard: StepGuard
    flops_per_cell: float
    """Of forward and backward."""
    peak_flops: float | None
    """Peak of a rank's device, FLOP/s; None: unknown."""
    gradient_norms: GradientNorms
    rank_times: RankTimes
    measured: MeasuredGenes | None
    """With data.unmeasured=mask."""
    lock: IO[str] | None = None
    last_checkpoint: str | None = None
    """Name of the newest good checkpoint."""
    validated: tuple[int, float] | None = None
    """Step and masked MSE of the last validation."""
    saving: Saving | None = None
    """Checkpoint that is being written while training goes on."""
    stalled_s: float = 0.0
    """Time that training stood still for checkpoints since the last row of metrics."""
    failed_saves: int = 0
    """Checkpoints in a row that could not be written."""
    skipped_cells: int = 0
    """Damaged cells that this process has trained without, over all ranks."""


def summary(run: Run) -> dict[str, Any]:
    """Return what run.json says about the run, for the report."""
    return {
        "n_cells_train": len(run.corpus.splits["train"]),
        "n_cells_validation": len(run.corpus.splits["validation"]),
        "n_genes": len(run.corpus.genes),
        "n_datasets": len(run.corpus.datasets),
        "expression_bins": bin_labels(),
        "parameters": parameters_by_part(run.model),
        "corpus": run.corpus.location.url,
        "world_size": run.ranks.world_size,
        "device": device_name(run.ranks.device),
        "ds_config": run.config.engine.ds_config,
        "corpus_hash": run.state.corpus_hash,
        "genes_hash": run.state.genes_hash,
        "graph_hash": run.state.graph_hash,
        "features_hash": run.state.features_hash,
        "weights_hash": run.state.weights_hash,
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
    accumulated = ds_config["gradient_accumulation_steps"]
    stage = ds_config["zero_optimization"]["stage"]
    log.info("configuration:\n%s", to_yaml(config).rstrip())
    log.info(
        "corpus: %d training cells, %d validation cells, %d genes, %d datasets",
        len(corpus.splits["train"]), len(corpus.splits["validation"]),
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
        accumulated, ranks.world_size, stage, e.precision, device_name(ranks.device),
    )  # fmt: skip
    last = learning_rate(config.optim, config.run.max_steps - 1)
    log.info(
        "learning rate: at most %.3g, %.3g (%.0f%%) in the last of %d steps",
        config.optim.lr, last, 100 * last / config.optim.lr, config.run.max_steps,
    )  # fmt: skip
    log.info("attention: %s", attention_path(config, ranks, model))
    if ranks.rank == 0 and e.precision == "bf16" and stage == 1 and accumulated > 1:
        log.warning(
            "ZeRO stage 1 adds the gradients of %d micro-steps up in bf16; stages 2 and 3 do in "
            "fp32: use engine.ds_config=zero2, or larger micro-batches",
            accumulated,
        )


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
    assert config.run.dir is not None
    run_dir, corpus = Path(config.run.dir), open_corpus(config)
    ds_config = resolve_ds_config(config.engine, world_size=ranks.world_size)
    model = build_partitioned(
        lambda: make_model(config, corpus), seed=config.run.seed, ds_config=ds_config
    )
    set_options(model, config, ds_config)
    weights = initial_weights(config, corpus, run_dir)
    if weights is not None:
        fill_parameters(model, weights)
    state = first_state(config, ranks, corpus, ds_config)
    check_same_on_all_ranks(config, state, model)
    describe(config, ranks, corpus, model, ds_config)
    engine = initialize(model, optim=config.optim, ds_config=ds_config)
    if weights is not None and config.engine.precision == "bf16":
        fill_master_weights(model, weights)
    run = Run(
        config=config,
        ranks=ranks,
        corpus=corpus,
        model=model,
        engine=engine,
        tracker=Tracker(
            config, run_dir, enabled=ranks.rank == 0, samples_node=ranks.local_rank == 0
        ),
        stop=stop,
        state=state,
        run_dir=run_dir,
        watchdog=Watchdog(
            run_dir / "heartbeat",
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout_s=config.engine.timeout_s,
            node=node_name(),
        ),
        guard=StepGuard(
            spike_zscore=config.run.spike_zscore,
            spike_window=config.run.spike_window,
            max_skipped_in_a_row=config.run.max_skipped_steps,
        ),
        flops_per_cell=training_flops(config, corpus, model),
        peak_flops=peak_flops(config, ranks),
        gradient_norms=GradientNorms(engine, model),
        rank_times=RankTimes(),
        measured=measured_genes(config, corpus),
    )
    if dry_run:
        on_first_rank(lambda: check_run_folder(run_dir, config, state))
    else:
        open_run_folder(run, ds_config)
    return run


def open_corpus(config: RunConfig) -> Corpus:
    """Open the corpus.

    Raises:
        ValueError: It has no training cells, its statistics are of another transform, or it does
            not say which genes its datasets measure, and `data.unmeasured` asks for it.
    """
    assert config.data.corpus is not None
    corpus = Corpus(config.data.corpus, cache_dir=config.data.cache_dir)
    if corpus.gene_stats.target_sum != config.data.target_sum:
        raise ValueError(
            f"data.target_sum: got {config.data.target_sum:g}, "
            f"the corpus statistics are for {corpus.gene_stats.target_sum:g}"
        )
    measured_genes(config, corpus)
    if not len(corpus.splits["train"]):
        raise ValueError(f"data.corpus={config.data.corpus}: its training split has no cells")
    return corpus


def measured_genes(config: RunConfig, corpus: Corpus) -> MeasuredGenes | None:
    """Return which genes the cells' datasets measure, or None where `data.unmeasured` ignores it.

    Raises:
        ValueError: The corpus does not say.
    """
    return None if config.data.unmeasured == "zero" else MeasuredGenes.of_corpus(corpus)


def set_options(model: ScLong, config: RunConfig, ds_config: dict[str, Any]) -> None:
    """Tell the model's layers how to run.

    Raises:
        ValueError: Compiled layers under ZeRO-3.
    """
    if config.engine.compile_layers and ds_config["zero_optimization"]["stage"] == 3:
        raise ValueError(
            "engine.compile_layers: ZeRO-3 gathers the weights between the operations of a layer, "
            "which a compiled layer does not show; use engine.ds_config=zero1 or zero2"
        )
    for performer in model.performers().values():
        performer.recompute = config.engine.activation_checkpointing
        performer.compile_layers = config.engine.compile_layers
        for layer in performer.layers:
            layer.attention.backend = config.engine.attention_backend


def first_state(
    config: RunConfig, ranks: Ranks, corpus: Corpus, ds_config: dict[str, Any]
) -> TrainState:
    """Return the state of a run that has not made a step."""
    return TrainState(
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
        weights_hash=hash_of(config.data.dataset_weights),
    )


def training_flops(config: RunConfig, corpus: Corpus, model: ScLong) -> float:
    """Return the FLOPs of a training step per cell, for a cell of the corpus's mean size."""
    n_expressed = round(corpus.cells.n_values / len(corpus))
    return training_flops_per_cell(
        config.model,
        corpus.n_genes,
        model.gene_encoder.n_edges,
        micro_batch=config.engine.train_micro_batch_size_per_gpu,
        n_expressed=n_expressed,
        n_wanted=target_count(n_expressed, config.objective),
    )


def peak_flops(config: RunConfig, ranks: Ranks) -> float | None:
    """Return the peak of a rank's device in FLOP/s, or None when it is not known."""
    if ranks.device.type == "cpu":
        return None
    device = device_of_name(device_name(ranks.device))
    return None if device is None else device.flops_per_s(config.engine.precision)


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
    if on_first_rank(lambda: bool(complete_checkpoints(run_dir / "checkpoints"))):
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
    except (ValueError, EOFError, TypeError, MemoryError, zipfile.BadZipFile) as error:
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
    found = load(
        run.engine,
        run_dir / "checkpoints",
        accept=lambda state: refuse_other_inputs(run_dir, state, run.state),
    )
    if found is not None:
        run.state, run.last_checkpoint = found.state, found.name
        step, window = run.state.step, run.config.run.spike_window
        history = on_first_rank(
            lambda: history_of(read_metrics(run_dir), step=step, spike_window=window)
        )
        # The rows of the last steps may be lost with a machine; the checkpoint is not.
        run.guard.restore(replace(history, skipped=run.state.skipped_steps))
        on_first_rank(lambda: take_over_ids(run_dir, run_dir / "checkpoints" / found.name))
    on_first_rank(lambda: write_inputs(run, ds_config))
    run.tracker.start(
        params={
            "world_size": run.ranks.world_size,
            "parameters": count_parameters(run.model),
            "ds_config": ds_config,
        },
        tags={
            "corpus_hash": run.state.corpus_hash,
            "genes_hash": run.state.genes_hash,
            "graph_hash": str(run.state.graph_hash),
        },
        artifacts=[run_dir / "config.yaml", run_dir / "ds_config.json"],
        resumed=found is not None,
        step=run.state.step,
        summary=summary(run),
    )
    record_opening(run, found)


def record_opening(run: Run, found: Loaded | None) -> None:
    """Log and record whether the run is new, and if not, what it goes on from."""
    step, world_size = run.state.step, run.ranks.world_size
    if found is None:
        run.tracker.event("start", step=step, world_size=world_size)
        log.info("run folder %s: new run", run.run_dir)
        return
    for problem in found.damaged:
        run.tracker.event("checkpoint_damaged", step=step, problem=problem)
    run.tracker.event(
        "resume", step=step, world_size=world_size, saved_by=found.saved_by, path=found.name,
        seconds=round(found.seconds, 3),
    )  # fmt: skip
    converted = "" if found.saved_by == world_size else f", converted from {found.saved_by} ranks"
    log.info("run folder %s: resuming after step %d%s", run.run_dir, step, converted)


def claim_run_folder(run: Run) -> None:
    """Make the run folder and lock it; refuse one that holds another run's checkpoints."""
    checkpoints = run.run_dir / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run.dir={run.run_dir}: {error}") from None
    run.lock = lock_run_folder(run.run_dir, wait_s=60)
    restore_best(checkpoints)
    if complete_checkpoints(checkpoints):
        refuse_changes(run.run_dir / "config.yaml", run.config)


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
