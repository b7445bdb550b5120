"""Set a training run up: build model and engine, open the run folder, resume.

Every rank calls `build`. Reads the corpus, the gene
graph and the newest checkpoint; writes config.yaml, ds_config.json, genes.tsv, gene_graph.npz,
random_features.safetensors and run.json into the run folder.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sclong_ds.checkpoint.on_disk import complete_checkpoints
from sclong_ds.checkpoint.state import TrainState
from sclong_ds.config.sections import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    RunSection,
)
from sclong_ds.config.strict_yaml import to_yaml
from sclong_ds.corpus.corpus import Corpus, GeneStats
from sclong_ds.corpus.gene_graph import read_gene_graph
from sclong_ds.engine.deepspeed_engine import (
    build_partitioned,
    fill_master_weights,
    fill_parameters,
    gather_at_once,
    initialize,
)
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.engine.gradient_norms import GradientNorms
from sclong_ds.engine.ranks import Ranks, on_first_rank
from sclong_ds.exported.initial_weights import InitialWeights, check_initial_model
from sclong_ds.job.signals import StopRequest
from sclong_ds.job.starting import Starting
from sclong_ds.model.features_file import read_features
from sclong_ds.model.performer import PerformerLayer
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.cell_start import cell_start
from sclong_ds.objective.measured import MeasuredGenes
from sclong_ds.objective.targets import target_count
from sclong_ds.planning.costs import training_flops_per_cell
from sclong_ds.planning.devices import device_of_name
from sclong_ds.run_folder.identity import node_name
from sclong_ds.tracking.check import check_tracking
from sclong_ds.tracking.tracker import Tracker
from sclong_ds.training.guards import StepGuard
from sclong_ds.training.resume import first_state, open_run_folder
from sclong_ds.training.run import Run, describe, device_name
from sclong_ds.training.run_checks import (
    check_run_folder,
)
from sclong_ds.training.saving import PATIENCE
from sclong_ds.training.timing import RankTimes
from sclong_ds.training.watchdog import Watchdog

LEAST_SHARE = 1e-9
"""Of a gene without counts."""

# The messages are part of the training log.
log = logging.getLogger("sclong_ds.pretrain")


def build(
    config: RunConfig, ranks: Ranks, stop: StopRequest, starting: Starting, *, dry_run: bool
) -> Run:
    """Build the model, the engine and the tracker, and go back to the newest checkpoint."""
    run_dir = Path(str(config.run.dir))
    starting.phase("tracking", "MLflow")
    on_first_rank(lambda: check_tracking(config.tracking, run_dir))
    starting.phase("corpus", f"the corpus at {config.data.corpus}")
    corpus = open_corpus(config.data)
    starting.phase("model", "the model and its optimizer, or another rank that makes them")
    ds_config = resolve_ds_config(config.engine, world_size=ranks.world_size)
    model = build_partitioned(
        lambda: make_model(config.model, corpus), seed=config.run.seed, ds_config=ds_config
    )
    set_options(model, config.engine, ds_config)
    weights = initial_weights(
        config.run.init_from, config.model, corpus, target_sum=config.data.target_sum,
        run_dir=run_dir,
    )  # fmt: skip
    if weights is not None:
        fill_parameters(model, weights)
    state = first_state(config, ranks, corpus, ds_config)
    shared = to_yaml(replace(config, run=replace(config.run, dir=None)))
    check_same_on_all_ranks(shared, state, model)
    describe(config, ranks, corpus, model, ds_config)
    engine = initialize(model, optim=config.optim, ds_config=ds_config, waits=starting.waits)
    if weights is not None and config.engine.precision == "bf16":
        fill_master_weights(model, weights)
    run = Run(
        config=config,
        ranks=ranks,
        corpus=corpus,
        model=model,
        engine=engine,
        tracker=Tracker(
            config.tracking, run_dir, enabled=ranks.rank == 0, samples_node=ranks.local_rank == 0
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
        guard=step_guard(config.run),
        flops_per_cell=training_flops(corpus, model, config.engine, config.objective),
        peak_flops=peak_flops(config.engine, ranks),
        gradient_norms=GradientNorms(engine, model),
        rank_times=RankTimes(),
        measured=measured_genes(config.data, corpus),
    )
    if dry_run:
        on_first_rank(lambda: check_run_folder(run_dir, config, state))
    else:
        starting.phase("checkpoint", f"the newest checkpoint in {run_dir}", patience=PATIENCE)
        open_run_folder(run, ds_config, starting)
    return run


def step_guard(settings: RunSection) -> StepGuard:
    """Return the guard of a run's steps."""
    return StepGuard(
        spike_zscore=settings.spike_zscore,
        spike_window=settings.spike_window,
        max_skipped_in_a_row=settings.max_skipped_steps,
    )


def check_same_on_all_ranks(settings: str, state: TrainState, model: ScLong) -> None:
    """Check that all ranks read the same files and draw the same random features.

    Args:
        settings: The configuration as text, without what may differ between ranks.
        state: State that the run begins with.
        model: The model.

    Raises:
        ValueError: Which ranks differ from rank 0.
    """
    features = [
        performer.features(torch.device("cpu"))[0].numpy().tobytes()
        for performer in model.performers().values()
    ]
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


def open_corpus(data: DataConfig) -> Corpus:
    """Open the corpus.

    Raises:
        ValueError: It has no training cells, its statistics are of another transform, or it does
            not say which genes its datasets measure, and `data.unmeasured` asks for it.
    """
    assert data.corpus is not None
    corpus = Corpus(data.corpus, cache_dir=data.cache_dir)
    if corpus.gene_stats.target_sum != data.target_sum:
        raise ValueError(
            f"data.target_sum: got {data.target_sum:g}, "
            f"the corpus statistics are for {corpus.gene_stats.target_sum:g}"
        )
    measured_genes(data, corpus)
    if not len(corpus.splits["train"]):
        raise ValueError(f"data.corpus={data.corpus}: its training split has no cells")
    return corpus


def measured_genes(data: DataConfig, corpus: Corpus) -> MeasuredGenes | None:
    """Return which genes the cells' datasets measure, or None where `data.unmeasured` ignores it.

    Raises:
        ValueError: The corpus does not say.
    """
    return None if data.unmeasured == "zero" else MeasuredGenes.of_corpus(corpus)


def set_options(model: ScLong, engine: EngineConfig, ds_config: dict[str, Any]) -> None:
    """Tell the model's layers how to run; before DeepSpeed's engine is made."""
    if ds_config["zero_optimization"]["stage"] == 3:
        gather_at_once(model, [PerformerLayer])
    for performer in model.performers().values():
        performer.recompute = engine.activation_checkpointing
        performer.compile_layers = engine.compile_layers
        for layer in performer.layers:
            assert isinstance(layer, PerformerLayer)
            layer.attention.backend = engine.attention_backend


def training_flops(
    corpus: Corpus, model: ScLong, engine: EngineConfig, objective: ObjectiveConfig
) -> float:
    """Return the FLOPs of a training step per cell, for a cell of the corpus's mean size."""
    n_expressed = round(corpus.cells.n_values / len(corpus))
    return training_flops_per_cell(
        model.config,
        corpus.n_genes,
        model.gene_encoder.n_edges,
        micro_batch=engine.train_micro_batch_size_per_gpu,
        n_expressed=n_expressed,
        n_wanted=target_count(n_expressed, objective),
    )


def peak_flops(engine: EngineConfig, ranks: Ranks) -> float | None:
    """Return the peak of a rank's device in FLOP/s, or None when it is not known."""
    if ranks.device.type == "cpu":
        return None
    device = device_of_name(device_name(ranks.device))
    return None if device is None else device.flops_per_s(engine.precision)


def initial_weights(
    init_from: str | None, model: ModelConfig, corpus: Corpus, *, target_sum: float, run_dir: Path
) -> InitialWeights | None:
    """Return the weights that a new run starts from, if not from random ones.

    Raises:
        ValueError: The model of `run.init_from` is not the run's.
    """
    if init_from is None:
        return None
    if on_first_rank(lambda: bool(complete_checkpoints(run_dir / "checkpoints"))):
        return None
    folder = Path(init_from)
    on_first_rank(lambda: check_initial_model(folder, model, corpus.genes, target_sum=target_sum))
    log.info("weights: from %s", folder)
    return InitialWeights(folder)


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


def make_model(model: ModelConfig, corpus: Corpus) -> ScLong:
    """Build the model for a corpus.

    Built from its genes, the gene graph, and the data's mean as the first prediction.
    """
    stats = corpus.gene_stats
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
        output_mean=first_output(model, stats),
        cell_start=cell_start(model, corpus),
    )


def first_output(model: ModelConfig, stats: GeneStats) -> float | NDArray[np.float64]:
    """Return the head's first output, one number or one per gene (G,).

    The mean value; with `model.cell_offset: poisson` the log of the mean share of a cell's counts,
    scaled as values are.
    """
    if model.cell_offset == "poisson":
        share = stats.total_counts / max(1, stats.total_counts.sum())
        return np.log(stats.target_sum * np.maximum(share, LEAST_SHARE))
    return stats.mean_expressed if model.gene_bias else stats.mean_expressed_all
