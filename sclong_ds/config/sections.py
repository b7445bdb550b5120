"""The sections of a run's configuration: every key with its meaning, unit and source."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias

POISSON_COUNTS = 64
"""Largest count whose chance `model.cell_offset: poisson` and `negative_binomial` compute."""
COUNT_OFFSETS = ("poisson", "negative_binomial")
"""Of `model.cell_offset`: those with which the head predicts the log of a rate."""
ProfileKind: TypeAlias = Literal["trace", "memory", "nsys", "flops", "communication"]
"""Of `run.profile`."""


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
    attention: Literal["favor", "softmax"] | None
    """Attention of this stack alone, in place of model.attention; null: model.attention. softmax in
    the large encoder is affordable with model.routing=expressed, where it reads about 1,500 genes
    of a cell instead of 4,096."""

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
    routing: Literal["top", "expressed"]
    """top: the large encoder reads top_seq_len genes of every cell (scLong); expressed: the cell's
    expressed and hidden genes alone, top_seq_len at most, so that no zero takes its time."""
    zero_genes: int | None
    """Most unexpressed genes of a cell that the model reads, beside the expressed and the hidden
    ones; others at each visit. Predictions and encodings of the rest are without context. null:
    all (scLong). A number needs routing expressed, and makes small models on a CPU many times
    faster."""
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
    """dual: both encoders; ablations: large: genes that it does not read keep their input vectors;
    mini: all genes go through the mini encoder (large_*, top_seq_len, routing have no effect)."""
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
    cell_offset: Literal["none", "visible", "poisson", "negative_binomial"]
    """How a cell's depth enters its predictions, so that the model learns what it does not explain;
    needs gene_bias. visible: one number per cell is added, the mean over its visible expressed
    genes of value minus gene bias (an additive two-way model). poisson: the head predicts a gene's
    log rate, and the value is that expected of a Poisson count of 1 or more at the cell's depth (a
    zero-truncated Poisson regression with the log depth as offset); the smallest visible value is
    taken for one count, so counts must be whole. negative_binomial: the same of a negative binomial
    count, with a learned dispersion per gene; for objective.loss=likelihood, which teaches it.
    none: nothing (scLong)."""
    cell_vector: Literal["none", "random", "svd", "residuals"]
    """A vector of the cell, made of its visible values, that every prediction reads beside its
    gene's representation: the values less the gene's mean, summed with a learned vector per gene,
    and an MLP. random: these vectors start at normal(0, 0.02); svd: they start at the principal
    directions of the first training cells, and so the model at a principal component imputation.
    residuals: as svd, but of the values less what a Poisson count leads to expect at the cell's
    depth, and what is read from it, and from the gene's representation, is added to the value that
    cell_offset gives for the gene's bias; needs cell_offset=poisson and objective.loss=mse. none:
    scLong."""
    zero_head: bool
    """A second head for the chance that a gene is expressed at all, read from the cell's vector and
    depth, so that `predict` gives P(expressed) and the expected value. Learns from zero targets:
    needs cell_vector, cell_offset=poisson or negative_binomial, objective.zero_mask_prob above 0
    and mask_prob_range null."""
    attention: Literal["favor", "softmax"]
    """Attention of the stacks that do not set their own. favor: FAVOR+ random features, linear in
    the genes; softmax: exact attention, quadratic (random_features, favor_eps, stabiliser_scope and
    redraws have no effect)."""
    favor_eps: float
    """Constant that FAVOR+ adds to every feature, 1e-12 to 1 (1e-4 in the Performer's code and in
    scLong). It gives every gene the same weight: the smaller, the closer to softmax attention, and
    the noisier where features are small."""
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

    def attention_of(self, stack: PerformerConfig) -> Literal["favor", "softmax"]:
        """Return what computes the attention of one of the stacks.

        Args:
            stack: large_encoder, mini_encoder or decoder.
        """
        return stack.attention or self.attention


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What the loader reads and how a cell becomes model input."""

    corpus: str | None
    """Folder of a finalized corpus (`python -m data_prep finalize`), or an fsspec URL of one
    (s3://...); required for training."""
    cache_dir: str | None
    """Where the tables of a remote corpus are kept; null: SCLONG_CACHE, else ~/.cache/sclong_ds."""
    cells_cache: int
    """MB (10^6 bytes) of cells of remote corpora that a machine keeps in the same place, for all of
    its ranks and runs together, so that later epochs and starts do not ask for them again; 0:
    none. Set it where cache_dir is on a disk of the machine."""
    target_sum: float
    """Counts of a cell are scaled to this total before log1p (1.0e4 in scLong's data)."""
    order: Literal["lanes", "groups"]
    """Order in which cells are visited, fixed for a run. lanes: a batch takes its cells from
    shuffle_group_chunks chunks that change at different times, and each rank reads the chunks of
    its own cells alone; with weights a chunk is read once an epoch. groups: chunks are read and
    shuffled in groups, and every rank reads all of them (runs of earlier versions, which keep
    it)."""
    shuffle_group_chunks: int
    """lanes: most chunks in use at a time, fewer if the batch size or loader_memory asks for it;
    one rank alone holds 1 MB for each and a quarter more, W ranks 1/W of that each. groups: chunks
    that are read and shuffled together, 3 MB each on every rank."""
    loader_memory: int
    """MB (10^6 bytes) that a rank's chunks and prepared batches may take, whatever the number of
    ranks."""
    prefetch_batches: int
    """Batches that a background thread keeps ready."""
    balance_by: str
    """What is sampled evenly: none visits every cell once an epoch; dataset, or a cell annotation
    of the corpus (tissue, cell_type, assay, donor, ...), gives each of its values a share
    proportional to its cells ** balance_exponent; cells of which it is not known are one value
    more."""
    balance_exponent: float
    """1: shares as in the corpus, 0: the same share for every value of balance_by."""
    max_repeats: int
    """Most visits to a cell in an epoch when sampling is balanced or weighted."""
    dataset_weights: str | None
    """File of `dataset_id<TAB>weight` lines, relative visits to a cell of each dataset; 0 leaves a
    dataset out. Instead of balance_by."""
    on_damage: Literal["stop", "skip"]
    """A damaged shard: stop the run, or log it, count its cells and train without them. A missing
    file, and damage of more than a tenth of the cells of a rank, stop the run in any case."""
    grown: bool
    """true: a run is resumed on its corpus with parts that were added since. From there on the
    order of cells is that of the grown corpus at the same position, and validation is not compared
    with what was before."""
    unmeasured: Literal["zero", "mask"]
    """Genes that a cell's dataset does not name. zero: they are read as not expressed (scLong).
    mask: nothing is known of them, so they are unknown to the model like hidden values, and never
    targets; a panel of 400 genes then does not teach that 27,474 others are silent. The large
    encoder reads none of them; with model.routing=top, where every cell sends top_seq_len genes,
    that needs as many visible ones."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """Masked-value reconstruction."""

    mask_prob: float
    """Share of a cell's non-zero values that are targets (0.15 in scLong); with mask_prob_range
    that of validation alone."""
    mask_prob_range: tuple[float, float] | None
    """[low, high]: every visit to a cell in training draws its share uniformly from here, instead
    of mask_prob; null: always mask_prob."""
    zero_mask_prob: float
    """Share of a cell's zero genes that are targets too (0 in scLong)."""
    replace_prob: float
    """Share of the targets whose value is hidden; the rest keep it (0.9 in scLong)."""
    loss: Literal["mse", "likelihood"]
    """Of a target above 0. mse: squared error of its value (scLong). likelihood: negative log
    likelihood of its count, known to be 1 or more, under the distribution that model.cell_offset
    names: poisson or negative_binomial; not with model.cell_vector=residuals. Other zero targets
    than those of model.zero_head have none."""
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
    warmup_steps: int | float
    """Steps of linear warm-up, from 0; of warm_restarts from the lowest rate, in every cycle. A
    number below 1 with a point is a share of decay_steps: 0.02 of 50,000 are 1,000 steps."""
    decay_steps: int | None
    """Step at which cosine reaches min_lr_ratio; the rate stays there afterwards. Of warm_restarts
    the length of the first cycle. null: run.max_steps."""
    min_lr_ratio: float
    """Lowest learning rate as a share of lr (cosine, warm_restarts)."""
    cycle_mult: float
    """Factor on a cycle's length without warm-up at each restart (2 in the released code); 1 for
    the other schedules."""
    cycle_gamma: float
    """Factor on the peak rate at each restart (0.9 in the released code); 1 for the other
    schedules."""

    def in_steps(self, max_steps: int) -> OptimConfig:
        """Return the section with warmup_steps and decay_steps as numbers of steps.

        Args:
            max_steps: Length of the run, for decay_steps null. A warm-up that is as long leaves
                one step of decay after the run's end.
        """
        length = self.decay_steps or max_steps
        warmup = self.warmup_steps
        if isinstance(warmup, float):
            warmup = min(round(warmup * length), length - 1)
        decay = self.decay_steps or max(max_steps, warmup + 1)
        return dataclasses.replace(self, warmup_steps=warmup, decay_steps=decay)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """DeepSpeed: names are DeepSpeed's own.

    The JSON of ds_config has "auto" for the numbers that are set here.
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
    """bf16 keeps fp32 master weights. CPUs without AVX512_BF16 or AMX are about 5 times slower in
    bf16."""
    linear_products: Literal["precision", "bf16", "fp8"]
    """How the linear layers of the Performer stacks multiply. precision: as engine.precision says.
    bf16: with precision=fp32 on a CPU that has AVX512_BF16 or AMX: factors and results are rounded
    to bf16, sums, weights and everything else stay fp32; products are twice as fast. fp8: the large
    encoder's four, forward and the gradient of their input, in 8-bit floats scaled token by token;
    for GPUs of compute capability 8.9 or newer, but was not run on one; slower on a CPU. Without
    compile_layers rounding to 8 bits is predicted to take longer than it saves. An exported model
    multiplies in fp32. `plan` predicts what it saves."""
    activation_checkpointing: bool
    """Recompute each Performer layer in the backward pass instead of storing its activations."""
    attention_backend: Literal["auto", "triton", "torch"]
    """What computes FAVOR+: auto: Triton kernels on GPUs that can run them, else plain torch."""
    compile_layers: bool
    """Compile each Performer layer with torch.compile, which fuses LayerNorm, GELU and residual;
    under ZeRO-3 between the gathering of its weights and their release. Not faster on a CPU
    (docs/measured.md); not timed on a GPU."""
    timeout_s: int
    """Longest time without progress before the run stops and names the rank it waits for; saving
    and callbacks may take four times as long, and each phase of a start 600 s at least."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_n_steps: int
    """Steps between checkpoints; one is also written at the end and on a signal."""
    keep_last: int
    """Newest checkpoints that are kept."""
    keep_every_n_steps: int | None
    """Checkpoints of multiples of it stay for ever; null: none."""
    keep_best: bool
    """The checkpoint with the lowest val/relative_mse so far stays (the error of hidden values over
    that of the strongest baseline), of those saved at a step that was validated."""
    max_failed_saves: int
    """Checkpoints in a row that could not be written (disk full) that stop the run."""
    asynchronous: bool
    """Write while training continues, from a copy in host memory (12 bytes a parameter, divided by
    the ranks); false: training waits, without a copy. The last checkpoint is always waited for."""


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
    parent_run: str | None
    """MLflow id of the run that this one is shown below, or the folder of a sweep; null: none."""
    tags: dict[str, str]
    """Further MLflow tags by name, for instance {project: atlas}; {}: none."""
    also: tuple[Literal["csv", "tensorboard", "wandb"], ...]
    """Trackers beside MLflow, or instead of it with enabled: false, for instance [csv, wandb]: what
    they get lies in the run folder first. csv writes metrics.csv; tensorboard and wandb need their
    libraries, and wandb works offline unless WANDB_MODE says otherwise. []: none."""
    flush_every_n_steps: int
    """Steps whose metrics are sent to MLflow in one call."""
    system_metrics_every_s: float
    """Seconds between samples of CPU, memory, disk, network and GPUs on every node; 0: none."""
    picture_cells: int | None
    """Validation cells whose embeddings and genes are drawn, beside the other pictures of every
    validation; 0: the others alone; null: no pictures."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """The training run itself."""

    dir: str | None
    """Run folder; starting again on the same folder resumes. Required for training."""
    seed: int
    """Seeds weights, cell order and masks."""
    init_from: str | None
    """MODEL_DIR of `export` or `import-reference` whose weights the run starts from; null: random
    weights. Training data, optimizer and schedule start from the
    beginning."""
    accept_changes: bool
    """true: a run is resumed under another objective section; losses before and after then mean
    different things, and validation figures are not compared."""
    max_steps: int
    """Optimizer steps after which the run is done. The learning rate's schedule follows it unless
    optim.decay_steps is set."""
    validate_every_n_steps: int
    """Steps between validations; one also runs at step 0 and at the end. 0: none."""
    validation_cells: int
    """Held-out cells (the first ones of the validation split, fixed masks) per validation."""
    spike_zscore: float
    """A loss this many robust standard deviations above the last ones is reported with its cells;
    0: never."""
    spike_window: int
    """Losses that a spike is measured against."""
    max_skipped_steps: int
    """Steps with a non-finite loss or gradient in a row (none of them is applied) that stop the
    run."""
    profile_step: int
    """Step that is looked into as `profile` says; 0: none."""
    profile: ProfileKind
    """What is looked at, and written below profile/ in the run folder. trace: operators and
    kernels, for https://ui.perfetto.dev; memory: the same with each allocation, and on a GPU the
    history of its allocator, for https://pytorch.org/memory_viz; nsys: marks the step for
    `nsys profile --capture-range=cudaProfilerApi`; flops: DeepSpeed's FLOPs profiler, forward by
    module; communication: what DeepSpeed's collectives moved, and in how many ms."""


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
