"""What must hold between the values of a configuration, and the message if it does not."""

from __future__ import annotations

import operator

from sclong_ds.config.sections import (
    COUNT_OFFSETS,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
)

MIN_FAVOR_EPS = 1e-12
"""Its square times the features of all genes must not vanish in float32: a denominator of zero."""


def check(config: RunConfig, where: str) -> None:
    """Check values against their ranges and against each other.

    Args:
        config: The configuration.
        where: Name of the file it was read from.

    Raises:
        ValueError: The first value that does not fit.
    """
    d = config.data
    rules: list[tuple[bool, str]] = [
        *_engine_rules(config.engine),
        (d.target_sum > 0, f"data.target_sum: got {d.target_sum}, must be > 0"),
        *_data_rules(d),
        *_objective_rules(config.objective),
        *_checkpoint_rules(config.checkpoint),
        *_model_rules(config.model),
        *_loss_rules(config.model, config.objective),
        *_optim_rules(config.optim),
        (
            (config.tracking.picture_cells or 0) >= 0,
            f"tracking.picture_cells: got {config.tracking.picture_cells}, must be >= 0 or null",
        ),
        (
            len(set(config.tracking.also)) == len(config.tracking.also),
            f"tracking.also: got {', '.join(config.tracking.also)}; name each tracker once",
        ),
    ]
    at_least_zero = (
        "optim.warmup_steps model.feature_redraw_interval run.validate_every_n_steps "
        "run.validation_cells run.seed run.spike_zscore run.profile_step model.projection_seed "
        "tracking.system_metrics_every_s data.cells_cache"
    )
    at_least_one = (
        "model.base_dim model.large_dim model.top_seq_len model.expression_hidden "
        "model.gene_encoder_layers data.shuffle_group_chunks data.prefetch_batches "
        "data.max_repeats data.loader_memory run.spike_window run.max_skipped_steps "
        "engine.train_batch_size engine.train_micro_batch_size_per_gpu engine.timeout_s "
        "checkpoint.every_n_steps checkpoint.keep_last checkpoint.max_failed_saves "
        "tracking.flush_every_n_steps run.max_steps"
    )
    for least, names in ((0, at_least_zero), (1, at_least_one)):
        for k in names.split():
            v = operator.attrgetter(k)(config)
            rules.append((v >= least, f"{k}: got {v}, must be >= {least}"))
    for ok, message in rules:
        if not ok:
            raise ValueError(f"{where}: {message}")


def _engine_rules(e: EngineConfig) -> list[tuple[bool, str]]:
    micro = e.train_micro_batch_size_per_gpu
    return [
        (
            e.gradient_clipping >= 0,
            f"engine.gradient_clipping: got {e.gradient_clipping}, must be >= 0",
        ),
        (
            micro == 0 or e.train_batch_size % micro == 0,
            f"engine.train_batch_size: got {e.train_batch_size}, must be a multiple of "
            f"engine.train_micro_batch_size_per_gpu {micro}",
        ),
        (
            e.linear_products != "bf16" or e.precision == "fp32",
            "engine.linear_products=bf16 has no effect with engine.precision=bf16: set it to "
            "precision",
        ),
    ]


def _data_rules(d: DataConfig) -> list[tuple[bool, str]]:
    """Return what must hold in the data section, and the message if it does not."""
    uniform = d.balance_by == "none"
    return [
        (
            0 <= d.balance_exponent <= 1,
            f"data.balance_exponent: got {d.balance_exponent}, allowed: 0 to 1",
        ),
        (
            not uniform or d.balance_exponent == 1,
            f"data.balance_exponent={d.balance_exponent} with data.balance_by=none would be "
            "ignored: set balance_by to dataset or a cell annotation (tissue, cell_type, ...), or "
            "the exponent to 1.0",
        ),
        (
            uniform or d.dataset_weights is None,
            "data.dataset_weights and data.balance_by both set weights: keep one of them",
        ),
        (
            not uniform or d.dataset_weights is not None or d.max_repeats == 1,
            f"data.max_repeats={d.max_repeats} with data.balance_by=none would be ignored: every "
            f"cell is visited once; set it to 1",
        ),
    ]


def _objective_rules(o: ObjectiveConfig) -> list[tuple[bool, str]]:
    """Return what must hold in the objective section, and the message if it does not."""
    share, hidden, zeros = o.mask_prob, o.replace_prob, o.zero_mask_prob
    low, high = o.mask_prob_range or (share, share)
    return [
        (0 < share <= 1, f"objective.mask_prob: got {share}, allowed: 0 < p <= 1"),
        (
            0 < low <= high <= 1,
            f"objective.mask_prob_range: got [{low}, {high}], allowed: 0 < low <= high <= 1 or "
            f"null",
        ),
        (0 <= zeros <= 1, f"objective.zero_mask_prob: got {zeros}, allowed: 0 to 1"),
        (
            0 < hidden <= 1,
            f"objective.replace_prob: got {hidden}, allowed: above 0 to 1 (at 0 every target is "
            f"shown to the model)",
        ),
    ]


def _loss_rules(m: ModelConfig, o: ObjectiveConfig) -> list[tuple[bool, str]]:
    """Return what must hold between model and objective, and the message if it does not."""
    likelihood = o.loss == "likelihood"
    return [
        (
            not likelihood or m.cell_vector != "residuals",
            "objective.loss=likelihood teaches log rates, and what model.cell_vector=residuals "
            "says is added to values: set model.cell_vector=svd, or objective.loss=mse",
        ),
        (
            not likelihood or m.cell_offset in COUNT_OFFSETS,
            f"objective.loss=likelihood needs model.cell_offset=poisson or negative_binomial, the "
            f"distribution of counts; got {m.cell_offset}",
        ),
        (
            not likelihood or o.zero_mask_prob == 0 or m.zero_head,
            f"objective.loss=likelihood is of counts of 1 or more: zero targets "
            f"(objective.zero_mask_prob={o.zero_mask_prob}) need model.zero_head=true",
        ),
        (
            not m.zero_head or (o.zero_mask_prob > 0 and o.mask_prob_range is None),
            f"model.zero_head learns from zero targets, of which each stands for mask_prob / "
            f"zero_mask_prob: needs objective.zero_mask_prob above 0 (got {o.zero_mask_prob}) and "
            f"objective.mask_prob_range=null",
        ),
    ]


def _checkpoint_rules(c: CheckpointConfig) -> list[tuple[bool, str]]:
    """Return what must hold in the checkpoint section, and the message if it does not."""
    every, kept = c.every_n_steps, c.keep_every_n_steps
    return [
        (
            kept is None or (kept >= 1 and (every < 1 or kept % every == 0)),
            f"checkpoint.keep_every_n_steps: got {kept}, must be a multiple of "
            f"checkpoint.every_n_steps {every}, or null",
        )
    ]


def _model_rules(m: ModelConfig) -> list[tuple[bool, str]]:
    """Return what must hold in the model section, and the message if it does not."""
    norm = m.mask_vector_max_norm
    kinds = {m.attention_of(stack) for stack in (m.large_encoder, m.mini_encoder, m.decoder)}
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
            m.zero_genes is None or m.zero_genes >= 1,
            f"model.zero_genes: got {m.zero_genes}, must be >= 1 or null",
        ),
        (
            m.zero_genes is None or (m.routing == "expressed" and not m.pad_token),
            f"model.zero_genes={m.zero_genes}: which genes a cell has depends on the cell, so it "
            f"needs model.routing=expressed and model.pad_token=false",
        ),
        (
            m.random_features_file is None or "favor" in kinds,
            "model.random_features_file is set but model.attention=softmax would ignore it: set it "
            "to null",
        ),
        (
            MIN_FAVOR_EPS <= m.favor_eps <= 1,
            f"model.favor_eps: got {m.favor_eps:g}, allowed: {MIN_FAVOR_EPS:g} to 1",
        ),
    ]
    for name in ("large_encoder", "mini_encoder", "decoder"):
        stack = getattr(m, name)
        sizes = {k: getattr(stack, k) for k in ("depth", "heads", "dim_head", "ff_mult")}
        sizes["nb_features"] = stack.features()
        rules += [(v >= 1, f"model.{name}.{k}: got {v}, must be >= 1") for k, v in sizes.items()]
    return rules + _cell_rules(m)


def _cell_rules(m: ModelConfig) -> list[tuple[bool, str]]:
    """Return what must hold between the parts that read a cell as a whole."""
    return [
        (
            m.cell_offset == "none" or m.gene_bias,
            f"model.cell_offset={m.cell_offset} is measured from the genes' biases: needs "
            f"model.gene_bias=true",
        ),
        (
            not m.zero_head or (m.cell_vector != "none" and m.cell_offset in COUNT_OFFSETS),
            f"model.zero_head reads the cell's vector and starts at the genes' rates: needs "
            f"model.cell_vector=random, svd or residuals (got {m.cell_vector}) and "
            f"model.cell_offset=poisson or negative_binomial (got {m.cell_offset})",
        ),
        (
            m.cell_vector != "residuals" or m.cell_offset == "poisson",
            f"model.cell_vector=residuals reads what Poisson counts do not explain: set "
            f"model.cell_offset=poisson (got {m.cell_offset}), or model.cell_vector=svd",
        ),
    ]


def _optim_rules(p: OptimConfig) -> list[tuple[bool, str]]:
    """Return what must hold in the optim section, and the message if it does not."""
    betas, warmup, decay = list(p.betas), p.warmup_steps, p.decay_steps
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
            isinstance(warmup, int) or warmup < 1,
            f"optim.warmup_steps: got {warmup}, allowed: a whole number of steps, or a share of "
            f"optim.decay_steps below 1",
        ),
        (
            decay is None or decay >= 1,
            f"optim.decay_steps: got {decay}, must be >= 1, or null for run.max_steps",
        ),
        (
            p.schedule == "constant" or decay is None or decay > warmup,
            f"optim.decay_steps: got {decay}, must exceed optim.warmup_steps {warmup}",
        ),
        (
            p.schedule == "warm_restarts" or p.cycle_mult == p.cycle_gamma == 1,
            "optim.cycle_mult, optim.cycle_gamma: must be 1 unless optim.schedule=warm_restarts "
            "(they would be ignored)",
        ),
        (p.cycle_mult >= 1, f"optim.cycle_mult: got {p.cycle_mult}, must be >= 1"),
        (0 < p.cycle_gamma <= 1, f"optim.cycle_gamma: got {p.cycle_gamma}, allowed: 0 < g <= 1"),
    ]
