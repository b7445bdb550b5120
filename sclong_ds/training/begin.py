"""Begin a start of a run: open its parts, check that all ranks see the same, put them together.

Every rank calls `begin`. Reads the corpus and the gene graph; `sclong_ds.training.resume` then
opens the run folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from sclong_ds.checkpoint.state import TrainState
from sclong_ds.config.strict_yaml import to_yaml
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.engine.gradient_norms import GradientNorms
from sclong_ds.files.atomic import Lock, file_sha256
from sclong_ds.job.starting import Starting
from sclong_ds.job.watchdog import Watchdog
from sclong_ds.loader.loader import most_lanes
from sclong_ds.loader.weights import Weights, balance_hash, weights_of
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.masked_cells import MaskedCells
from sclong_ds.run_folder.identity import node_name
from sclong_ds.tracking.tracker import Tracker
from sclong_ds.training.build import (
    log_health,
    measured_genes,
    open_corpus,
    open_engine,
    open_model,
)
from sclong_ds.training.callbacks.calling import Callbacks
from sclong_ds.training.pictured import Pictures
from sclong_ds.training.run import Counted, Given, Opened, describe
from sclong_ds.training.saving import Saver
from sclong_ds.training.timing import Rates
from sclong_ds.training.validation import Validation


@dataclass(slots=True, kw_only=True)
class Run:
    """A training run, as the training loop holds it."""

    given: Given
    opened: Opened
    counted: Counted
    saver: Saver
    validation: Validation
    rates: Rates
    lock: Lock | None = None
    """On the run folder, held by rank 0."""


def begin(given: Given, starting: Starting) -> Run:
    """Open the corpus, the model and the engine, and return the run at step 0.

    Args:
        given: What the start is given.
        starting: Told what the start waits for.

    Raises:
        ValueError: A setting that does not fit the files, or ranks that see different ones.
    """
    config, ranks = given.config, given.ranks
    starting.phase("corpus", f"the corpus at {config.data.corpus}")
    corpus = open_corpus(config.data)
    if ranks.rank == 0:
        log_health(corpus)
    starting.phase("model", "the model and its optimizer, or another rank that makes them")
    model, weights = open_model(given, corpus)
    sampling = weights_of(config.data, corpus)
    state = first_state(given, corpus, sampling)
    check_same_on_all_ranks(given, state, model)
    describe(given, corpus, model)
    engine = open_engine(given, model, weights, waits=starting.waits)
    watchdog = Watchdog(
        given.run_dir / "heartbeat", rank=ranks.rank, world_size=ranks.world_size,
        timeout_s=config.engine.timeout_s, node=node_name(),
    )  # fmt: skip
    cells = MaskedCells(
        corpus=corpus, data=config.data, objective=config.objective, model=config.model,
        seed=config.run.seed, device=ranks.device, measured=measured_genes(config.data, corpus),
        weights=sampling,
    )  # fmt: skip
    opened = Opened(
        ranks=ranks,
        stop=given.stop,
        cells=cells,
        model=model,
        engine=engine,
        gradient_norms=GradientNorms(engine, model),
        tracker=Tracker(
            config.tracking, given.run_dir,
            enabled=ranks.rank == 0, samples_node=ranks.local_rank == 0,
        ),
        watchdog=watchdog,
        callbacks=Callbacks(given.callbacks, ranks, watchdog),
    )  # fmt: skip
    return assemble(given, opened, Counted.at(state, config.run))


def assemble(given: Given, opened: Opened, counted: Counted) -> Run:
    """Give each part of the loop what it works with."""
    config, corpus = given.config, opened.cells.corpus
    saver = Saver(
        given.run_dir, config.checkpoint, engine=opened.engine, ranks=opened.ranks,
        tracker=opened.tracker, watchdog=opened.watchdog, callbacks=opened.callbacks,
    )  # fmt: skip
    validation = Validation(
        config.run,
        opened,
        micro_batch=config.engine.train_micro_batch_size_per_gpu,
        rank_times=counted.rank_times,
        saver=saver,
        pictures=Pictures(config.tracking.picture_cells, opened, config.engine),
    )
    rates = Rates.of_run(
        corpus, opened.model, engine=config.engine, objective=config.objective, ranks=opened.ranks
    )
    return Run(
        given=given, opened=opened, counted=counted, saver=saver, validation=validation, rates=rates
    )


def first_state(given: Given, corpus: Corpus, weights: Weights | None) -> TrainState:
    """Return the state of a run that has not made a step.

    Args:
        given: What the start is given.
        corpus: The corpus.
        weights: Of its training cells.
    """
    config = given.config
    data, batch = config.data, config.engine.train_batch_size
    lanes = 0
    if data.order == "lanes":
        most, memory = data.shuffle_group_chunks, data.loader_memory * 10**6
        lanes = most_lanes(
            corpus, batch, most=most, memory_bytes=memory, prefetch_batches=data.prefetch_batches
        )
    return TrainState(
        step=0,
        cells_seen=0,
        world_size=given.ranks.world_size,
        seed=config.run.seed,
        precision=config.engine.precision,
        zero_stage=given.ds_config["zero_optimization"]["stage"],
        corpus_hash=corpus.hash,
        genes_hash=corpus.genes.hash,
        graph_hash=_hash_of(config.model.gene_graph),
        features_hash=_hash_of(config.model.random_features_file),
        weights_hash=_hash_of(config.data.dataset_weights),
        balance_hash=balance_hash(data, weights, corpus.splits["train"]),
        lanes=lanes,
        lanes_batch=batch if lanes else 0,
    )


def _hash_of(path: str | None) -> str | None:
    return file_sha256(path) if path else None


def check_same_on_all_ranks(given: Given, state: TrainState, model: ScLong) -> None:
    """Check that all ranks read the same files and draw the same random features.

    Args:
        given: What the start is given.
        state: State that the run begins with.
        model: The model.

    Raises:
        ValueError: Which ranks differ from rank 0.
    """
    features = [
        performer.features(torch.device("cpu"))[0].numpy().tobytes()
        for performer in model.performers().values()
    ]
    # The run folder may be written in another way on each node.
    run = replace(given.config.run, dir=None)
    settings = to_yaml(replace(given.config, run=run))
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
