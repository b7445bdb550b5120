"""Run configuration: a frozen dataclass tree, a strict YAML loader and `key=value` overrides.

A run is described by one complete YAML file (a preset of `sclong_ds/presets/` or your own): every
key must be there, unknown keys, duplicate keys and wrong types are errors, and nothing is
inherited. `load_config("sclong_tiny", ["run.max_steps=10"])` reads a preset, applies the overrides
and returns a `RunConfig`; `to_yaml` writes it back. The configuration is never edited after it is
loaded. Each section is named after the module that consumes it.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from sclong_ds.strict_yaml import parse_value, parse_yaml, section_from_dict, unknown_key

PRESETS_DIR = Path(__file__).parent / "presets"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PerformerConfig:
    """One Performer stack (large encoder, mini encoder or decoder)."""

    depth: int
    """Number of layers (attention + feed-forward)."""
    heads: int
    """Attention heads."""
    dim_head: int
    """Width of one head."""
    nb_features: int | None
    """Random features per head; null means int(dim_head * ln(dim_head)), as in the Performer paper
    (arXiv:2009.14794)."""
    ff_mult: int
    """Hidden width of the feed-forward block as a multiple of the stack's width."""

    def features(self) -> int:
        """Return the number of random features, with null resolved."""
        return self.nb_features or int(self.dim_head * math.log(self.dim_head))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Architecture of `ScLong`. A checkpoint can be resumed only with the same section."""

    base_dim: int
    """Width C of the gene and expression vectors, the mini encoder and the decoder (200 in
    scLong)."""
    large_dim: int
    """Width D of the large encoder (1,280 in scLong)."""
    top_seq_len: int
    """Number T of highest-expressed genes of a cell that the large encoder reads (4,096 in
    scLong)."""
    expression_hidden: int
    """Hidden width of the expression encoder's MLP (50 in scLong)."""
    mask_vector_max_norm: float | None
    """Largest norm of the vector that stands for a hidden value (1.0 in the released code); null:
    no limit."""
    pad_token: bool
    """One more token behind the genes, without a value (true in the released code)."""
    gene_encoder: Literal["graph", "embedding", "none"]
    """graph: graph convolution of a gene table; ablations: embedding: the same table and layers
    without a graph; none: gene vectors alone (gene_encoder_layers has no effect)."""
    gene_encoder_layers: int
    """Graph convolution layers (1 in scLong)."""
    gene_graph: str | None
    """Path of the graph written by `python -m data_prep gene-graph`; required when gene_encoder is
    graph."""
    use_gene_vectors: bool
    """One learned vector per gene beside the gene encoder's output (gene2vec in scLong); false is
    an ablation."""
    gene_vectors: str | None
    """Path of a (genes, base_dim) .npy, say of `python -m data_prep gene-vectors`, at which the
    gene vectors and the gene encoder's table start; null: normal(0, 0.02) and normal(0, 1)."""
    contextual_encoder: Literal["dual", "large", "mini"]
    """dual: both encoders; ablations: large: genes beyond top_seq_len keep their input vectors;
    mini: all genes go through the mini encoder (large_* and top_seq_len have no effect)."""
    large_encoder: PerformerConfig
    """Performer over the top_seq_len highest-expressed genes."""
    mini_encoder: PerformerConfig
    """Performer over the remaining genes."""
    decoder: PerformerConfig
    """Final full-length Performer over all genes."""
    qkv_bias: bool
    """Biases in the query, key and value projections (false in the published configuration)."""
    head: Literal["mlp", "linear"]
    """Decoder of the expression value: mlp (the paper) or linear (the released code)."""
    head_init: Literal["mean", "random"]
    """mean: the last layer starts at zero and its bias at the data's mean; random: as any linear
    layer (the released code)."""
    gene_bias: bool
    """One learned output bias per gene, initialised at the gene's mean expressed value in the
    training cells."""
    attention: Literal["favor", "softmax"]
    """favor: FAVOR+ random features, linear in the genes; softmax: exact attention, quadratic
    (ablation: random_features, stabiliser_scope and redraws have no effect)."""
    random_features: Literal["orthogonal", "orthogonal_qr", "gaussian"]
    """orthogonal: uniform over rotations; orthogonal_qr: as QR leaves the signs, which biases the
    estimate (the released code); gaussian: independent (ablation)."""
    random_features_file: str | None
    """Path of the features to use before the first redraw, written by `import-reference`; null:
    they are drawn."""
    stabiliser_scope: Literal["sample", "head"]
    """Over what the key stabiliser of FAVOR+ takes its maximum: one cell, or one head of one
    cell."""
    feature_redraw_interval: int
    """Optimizer steps between redraws of the random features; 0 keeps the first draw."""
    projection_seed: int
    """Seed of the random features; each projection is a function of (seed, layer, redraw index)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What the loader reads and how a cell becomes model input."""

    corpus: str | None
    """Folder of a finalized corpus (`python -m data_prep finalize`); required for training."""
    target_sum: float
    """Counts of a cell are scaled to this total before log1p (1.0e4 in scLong's data)."""
    shuffle_group_chunks: int
    """Chunks that are read and shuffled together; memory is about 0.5 MB a chunk."""
    prefetch_batches: int
    """Batches that a background thread keeps ready."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """Masked-value reconstruction."""

    mask_prob: float
    """Share of a cell's non-zero values that are targets (0.15 in scLong)."""
    replace_prob: float
    """Share of the targets whose value is hidden; the rest keep it (0.9 in scLong)."""
    target_rounding: Literal["exact", "float32"]
    """exact: ceil(mask_prob * n) targets of n values; float32: the product is rounded to float32
    before, which makes one more at some n (the released code)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule, by optimizer step."""

    name: Literal["adamw", "adam"]
    """adamw decays matrices only; adam has no decay (the released code)."""
    lr: float
    """Peak learning rate."""
    betas: tuple[float, float]
    """Adam's decay rates of the first and second moment."""
    eps: float
    """Adam's denominator term."""
    weight_decay: float
    """Decoupled decay of matrices; biases, norms and vectors are not decayed. Must be 0 for
    adam."""
    schedule: Literal["cosine", "constant", "warm_restarts"]
    """Shape after the warm-up; warm_restarts: cosine cycles, each with its own warm-up (the
    released code)."""
    warmup_steps: int
    """Steps of linear warm-up, from 0; of warm_restarts from the lowest rate, in every cycle."""
    decay_steps: int
    """Step at which cosine reaches min_lr_ratio; the rate stays there afterwards. Independent of
    run.max_steps. Of warm_restarts the length of the first cycle."""
    min_lr_ratio: float
    """Lowest learning rate as a share of lr (cosine, warm_restarts)."""
    cycle_mult: float
    """Factor on a cycle's length without warm-up at each restart (2 in the released code); 1 for
    the other schedules."""
    cycle_gamma: float
    """Factor on the peak rate at each restart (0.9 in the released code); 1 for the other
    schedules."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """DeepSpeed: names are DeepSpeed's own.

    The JSON of ds_config says "auto" for the numbers that live here.
    """

    ds_config: str
    """zero1, zero2, zero3, zero3_offload (files of ds_configs/) or a path to a DeepSpeed JSON."""
    train_batch_size: int
    """Cells per optimizer step, over all ranks and accumulation steps."""
    train_micro_batch_size_per_gpu: int
    """Cells per forward pass on one rank; train_batch_size must be a multiple of it times the world
    size."""
    gradient_clipping: float
    """Largest norm of the whole gradient; 0 switches clipping off."""
    precision: Literal["fp32", "bf16"]
    """bf16 keeps fp32 master weights. CPUs without AMX are about 5 times slower in bf16."""
    activation_checkpointing: bool
    """Recompute each Performer layer in the backward pass instead of storing its activations."""
    attention_backend: Literal["auto", "triton", "torch"]
    """What computes FAVOR+: auto: Triton kernels on GPUs that can run them, else plain torch."""
    timeout_s: int
    """Longest wait in a collective before the run stops."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_n_steps: int
    """Steps between checkpoints; one is also written at the end and on a signal."""
    keep_last: int
    """Newest checkpoints that are kept."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """MLflow. The run folder holds every metric too, whatever is set here."""

    enabled: bool
    """false: no MLflow, only the run folder."""
    uri: str | None
    """Tracking server; null: MLFLOW_TRACKING_URI, else an sqlite file mlflow.db beside the run
    folder."""
    experiment: str
    """MLflow experiment."""
    run_name: str | None
    """MLflow run name; null: the name of the run folder."""
    flush_every_n_steps: int
    """Steps whose metrics are sent to MLflow in one call."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """The training run itself."""

    dir: str | None
    """Run folder; starting again on the same folder resumes. Required for training."""
    seed: int
    """Seeds weights, cell order and masks."""
    init_from: str | None
    """MODEL_DIR of `export` or `import-reference` whose weights the run starts from; null: random
    weights. Training data, optimizer and schedule begin anew."""
    max_steps: int
    """Optimizer steps after which the run is done."""
    validate_every_n_steps: int
    """Steps between validations; one also runs at step 0 and at the end. 0: none."""
    validation_cells: int
    """Held-out cells (the first ones of the validation split, fixed masks) per validation."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The whole configuration of a run."""

    model: ModelConfig
    """Architecture."""
    data: DataConfig
    """Corpus and transform."""
    objective: ObjectiveConfig
    """Masking."""
    optim: OptimConfig
    """Optimizer and schedule."""
    engine: EngineConfig
    """DeepSpeed, batch sizes, precision."""
    checkpoint: CheckpointConfig
    """Saving."""
    tracking: TrackingConfig
    """MLflow."""
    run: RunSection
    """Length, seed, folder, validation."""


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the project, sorted."""
    return sorted(p.stem for p in PRESETS_DIR.glob("*.yaml"))


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a preset or a YAML file, apply overrides and check everything.

    Args:
        source: Name of a preset (`sclong_tiny`) or path of a YAML file.
        overrides: `section.key=value` strings; values are read as YAML.

    Returns:
        The checked configuration.

    Raises:
        FileNotFoundError: No such preset or file.
        ValueError: Unknown, duplicate or missing key, wrong type, or values that contradict each
            other.
    """
    path = PRESETS_DIR / f"{source}.yaml" if str(source) in preset_names() else Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"--config {source}: no such preset or file; presets are {', '.join(preset_names())}"
        )
    tree = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    for item in overrides:
        _apply_override(tree, item)
    config = section_from_dict(RunConfig, tree, path.name)
    _check(config, path.name)
    return config


def _apply_override(tree: dict[str, Any], item: str) -> None:
    """Set one `section.key=value` in the raw tree; names are checked when the tree is built."""
    key, sep, text = item.partition("=")
    if not sep or not key or "." not in key:
        raise ValueError(
            f"override '{item}': write section.key=value, for instance run.max_steps=100"
        )
    *parents, last = key.strip().split(".")
    node = tree
    for name in parents:
        child = node.get(name)
        if not isinstance(child, dict):
            raise ValueError(f"override '{item}': {unknown_key(name, node)}")
        node = child
    if last not in node:
        raise ValueError(f"override '{item}': {unknown_key(last, node)}")
    if _field_is_text(parents, last) and text not in ("null", "~"):
        node[last] = text
        return
    try:
        node[last] = parse_value(text) if text else None
    except ValueError as error:
        raise ValueError(f"override '{item}': {error}") from None


def _field_is_text(parents: list[str], name: str) -> bool:
    """Tell whether a key takes text, so that paths such as 2024-01-01 or 007 stay text."""
    cls: Any = RunConfig
    for part in [*parents, name]:
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        cls = hints.get(part)
    return cls is str or cls == str | None


def _check(config: RunConfig, where: str) -> None:
    """Check values against their ranges and against each other."""
    d, o, e = config.data, config.objective, config.engine
    hidden, micro = o.replace_prob, e.train_micro_batch_size_per_gpu
    rules: list[tuple[bool, str]] = [
        (0 < o.mask_prob <= 1, f"objective.mask_prob: got {o.mask_prob}, allowed: 0 < p <= 1"),
        (0 <= hidden <= 1, f"objective.replace_prob: got {hidden}, allowed: 0 to 1"),
        (
            e.gradient_clipping >= 0,
            f"engine.gradient_clipping: got {e.gradient_clipping}, must be >= 0",
        ),
        (
            micro == 0 or e.train_batch_size % micro == 0,
            f"engine.train_batch_size: got {e.train_batch_size}, must be a multiple of "
            f"engine.train_micro_batch_size_per_gpu {micro}",
        ),
        (d.target_sum > 0, f"data.target_sum: got {d.target_sum}, must be > 0"),
        *_model_rules(config.model),
        *_optim_rules(config.optim),
    ]
    at_least_zero = (
        "optim.warmup_steps model.feature_redraw_interval run.validate_every_n_steps "
        "run.validation_cells run.seed model.projection_seed"
    )
    at_least_one = (
        "model.base_dim model.large_dim model.top_seq_len model.expression_hidden "
        "model.gene_encoder_layers data.shuffle_group_chunks data.prefetch_batches "
        "engine.train_batch_size engine.train_micro_batch_size_per_gpu engine.timeout_s "
        "checkpoint.every_n_steps checkpoint.keep_last tracking.flush_every_n_steps run.max_steps"
    )
    for least, names in ((0, at_least_zero), (1, at_least_one)):
        for k in names.split():
            v = operator.attrgetter(k)(config)
            rules.append((v >= least, f"{k}: got {v}, must be >= {least}"))
    for ok, message in rules:
        if not ok:
            raise ValueError(f"{where}: {message}")


def _model_rules(m: ModelConfig) -> list[tuple[bool, str]]:
    """Return what must hold in the model section, and what to say if it does not."""
    norm = m.mask_vector_max_norm
    rules = [
        (
            norm is None or norm > 0,
            f"model.mask_vector_max_norm: got {norm}, must be > 0 or null",
        ),
        (
            m.use_gene_vectors or m.gene_encoder != "none",
            "model.gene_encoder=none with model.use_gene_vectors=false: the model could not tell "
            "genes apart; keep one of them",
        ),
        (
            m.gene_graph is None or m.gene_encoder == "graph",
            f"model.gene_graph is set but model.gene_encoder={m.gene_encoder} would ignore it: "
            f"set it to null",
        ),
        (
            m.head_init == "mean" or not m.gene_bias,
            "model.gene_bias starts at the genes' means: needs model.head_init=mean",
        ),
        (
            m.random_features_file is None or m.attention == "favor",
            "model.random_features_file is set but model.attention=softmax would ignore it: set it "
            "to null",
        ),
    ]
    for name in ("large_encoder", "mini_encoder", "decoder"):
        stack = getattr(m, name)
        sizes = {k: getattr(stack, k) for k in ("depth", "heads", "dim_head", "ff_mult")}
        sizes["nb_features"] = stack.features()
        rules += [(v >= 1, f"model.{name}.{k}: got {v}, must be >= 1") for k, v in sizes.items()]
    return rules


def _optim_rules(p: OptimConfig) -> list[tuple[bool, str]]:
    """Return what must hold in the optim section, and what to say if it does not."""
    betas = list(p.betas)
    return [
        (p.lr > 0, f"optim.lr: got {p.lr}, must be > 0"),
        (p.weight_decay >= 0, f"optim.weight_decay: got {p.weight_decay}, must be >= 0"),
        (all(0 <= b < 1 for b in betas), f"optim.betas: got {betas}, each must be in [0, 1)"),
        (p.eps > 0, f"optim.eps: got {p.eps}, must be > 0"),
        (0 <= p.min_lr_ratio <= 1, f"optim.min_lr_ratio: got {p.min_lr_ratio}, allowed: 0 to 1"),
        (
            p.name != "adam" or p.weight_decay == 0,
            "optim.weight_decay: must be 0 for adam (it would be ignored); use adamw",
        ),
        (
            p.schedule == "constant" or p.decay_steps > p.warmup_steps,
            f"optim.decay_steps: got {p.decay_steps}, must exceed optim.warmup_steps "
            f"{p.warmup_steps}",
        ),
        (
            p.schedule == "warm_restarts" or p.cycle_mult == p.cycle_gamma == 1,
            "optim.cycle_mult, optim.cycle_gamma: must be 1 unless optim.schedule=warm_restarts "
            "(they would be ignored)",
        ),
        (p.cycle_mult >= 1, f"optim.cycle_mult: got {p.cycle_mult}, must be >= 1"),
        (0 < p.cycle_gamma <= 1, f"optim.cycle_gamma: got {p.cycle_gamma}, allowed: 0 < g <= 1"),
    ]
