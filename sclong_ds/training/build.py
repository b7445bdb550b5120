"""Open what a run trains on and with: the corpus, the model, DeepSpeed's engine.

Every rank does the same. Reads the corpus, the gene graph and the files that the model section
names; writes nothing.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sclong_ds.checkpoint.on_disk import complete_checkpoints
from sclong_ds.config.sections import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    RunSection,
)
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.gene_graph import read_gene_graph
from sclong_ds.datasheet.health import health_of
from sclong_ds.engine.deepspeed_engine import (
    Engine,
    build_partitioned,
    fill_master_weights,
    fill_parameters,
    gather_at_once,
    initialize,
)
from sclong_ds.engine.ranks import on_first_rank
from sclong_ds.exported.initial_weights import InitialWeights, check_initial_model
from sclong_ds.exported.training_cells import validation_digests, validation_warnings
from sclong_ds.model.features_file import read_features
from sclong_ds.model.performer import PerformerLayer
from sclong_ds.model.sclong import ScLong
from sclong_ds.model.values.cell_vector import CellStart
from sclong_ds.objective.measured import MeasuredGenes
from sclong_ds.objective.starts import cell_start, first_output
from sclong_ds.training.run import Given

# The messages are part of the training log.
log = logging.getLogger("sclong_ds.pretrain")


def open_model(given: Given, corpus: Corpus) -> tuple[ScLong, InitialWeights | None]:
    """Build the model, with the weights that a new run starts from, if not from random ones.

    Args:
        given: What the start is given.
        corpus: The corpus.

    Raises:
        ValueError: A file of the model does not fit, or the model of `run.init_from` is another.
    """
    config = given.config
    # If all checkpoints turn out to be damaged, the start ends: no run trains from what is left out
    # of a model that one is going to fill.
    resumes = on_first_rank(lambda: bool(complete_checkpoints(given.run_dir / "checkpoints")))
    weights = None
    if not resumes:
        weights = initial_weights(
            config.run.init_from, config.model, corpus, target_sum=config.data.target_sum
        )
        if weights is not None:
            on_first_rank(lambda: compare_validation(config.run, corpus))
    # Here and not while the model is built: ZeRO-3 then rounds every new tensor to its precision.
    start = None if resumes or weights is not None else cell_start(config.model, corpus)
    model = build_partitioned(
        lambda: make_model(config.model, corpus, start),
        seed=config.run.seed,
        ds_config=given.ds_config,
    )
    set_options(model, config.engine, given.ds_config)
    if weights is not None:
        fill_parameters(model, weights)
    return model, weights


def open_engine(
    given: Given, model: ScLong, weights: InitialWeights | None, *, waits: Callable[[str], None]
) -> Engine:
    """Make DeepSpeed's engine of a model.

    Args:
        given: What the start is given.
        model: The model, as `open_model` built it.
        weights: The weights that it starts from.
        waits: Told what is waited for.
    """
    config = given.config
    engine = initialize(model, optim=config.optim, ds_config=given.ds_config, waits=waits)
    if weights is not None and config.engine.precision == "bf16":
        fill_master_weights(model, weights)
    return engine


def open_corpus(data: DataConfig) -> Corpus:
    """Open the corpus.

    Raises:
        ValueError: It has no training cells, its statistics are of another transform, or it does
            not say which genes its datasets measure, and `data.unmeasured` asks for it.
    """
    assert data.corpus is not None
    corpus = Corpus(data.corpus, cache_dir=data.cache_dir, cells_cache=data.cells_cache * 10**6)
    if corpus.gene_stats.target_sum != data.target_sum:
        raise ValueError(
            f"data.target_sum: got {data.target_sum:g}, "
            f"the corpus statistics are for {corpus.gene_stats.target_sum:g}"
        )
    measured_genes(data, corpus)
    if not len(corpus.splits["train"]):
        raise ValueError(f"data.corpus={data.corpus}: its training split has no cells")
    return corpus


def log_health(corpus: Corpus) -> None:
    """Log the verdict on the corpus, as a warning where it is not green."""
    health = health_of(corpus.catalogue)
    level = logging.INFO if health.verdict == "green" else logging.WARNING
    for line in health.lines():
        log.log(level, "%s", line)


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
    for name, performer in model.performers().items():
        if engine.linear_products == "bf16" or name == "large_encoder":
            performer.set_products(engine.linear_products)
        performer.recompute = engine.activation_checkpointing
        performer.compile_layers = engine.compile_layers
        for layer in performer.layers:
            assert isinstance(layer, PerformerLayer)
            layer.attention.backend = engine.attention_backend


def initial_weights(
    init_from: str | None, model: ModelConfig, corpus: Corpus, *, target_sum: float
) -> InitialWeights | None:
    """Return the weights that a new run starts from, if not from random ones.

    Raises:
        ValueError: The model of `run.init_from` is not the run's.
    """
    if init_from is None:
        return None
    folder = Path(init_from)
    on_first_rank(lambda: check_initial_model(folder, model, corpus.genes, target_sum=target_sum))
    log.info("weights: from %s", folder)
    return InitialWeights(folder)


def compare_validation(settings: RunSection, corpus: Corpus) -> None:
    """Warn where a run is not scored on what the model that it starts from was scored on.

    Args:
        settings: Section run, with `init_from`.
        corpus: The corpus.

    Raises:
        ValueError: A file of the model is damaged.
    """
    if not settings.validate_every_n_steps:
        return
    try:
        digests = validation_digests(corpus, settings.validation_cells)
    except (ValueError, OSError) as error:
        # What a damaged chunk means is a matter of data.on_damage, when it is used.
        log.warning("validation: not compared with that of the model's training (%s)", error)
        return
    for warning in validation_warnings(Path(str(settings.init_from)), digests):
        log.warning("validation: %s", warning)


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


def make_model(model: ModelConfig, corpus: Corpus, start: CellStart | None) -> ScLong:
    """Build the model for a corpus.

    Built from its genes, the gene graph, and the data's mean as the first prediction.

    Args:
        model: The `model` section.
        corpus: The corpus.
        start: What the cell's vector starts from; None where all weights are replaced afterwards.
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
        cell_start=start,
    )
