"""What a training run is given, what it opens, what it counts; and its description."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.favor_attention import triton_obstacle
from sclong_ds.checkpoint.state import TrainState
from sclong_ds.config.sections import EngineConfig, OptimConfig, RunConfig, RunSection
from sclong_ds.config.strict_yaml import to_yaml
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.engine.deepspeed_engine import Engine, count_parameters
from sclong_ds.engine.gradient_norms import GradientNorms
from sclong_ds.engine.ranks import Ranks
from sclong_ds.engine.schedule import learning_rate, unfinished_schedule
from sclong_ds.job.signals import StopRequest
from sclong_ds.job.watchdog import Watchdog
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.masked_cells import MaskedCells
from sclong_ds.objective.metrics import bin_labels
from sclong_ds.page.words import counted
from sclong_ds.planning.devices import FP8_CAPABILITY, check_products
from sclong_ds.tracking.tracker import Tracker
from sclong_ds.training.callbacks.callback import Callback, TrainingRun
from sclong_ds.training.callbacks.calling import Callbacks
from sclong_ds.training.guards import StepGuard
from sclong_ds.training.timing import RankTimes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a start is given."""

    config: RunConfig
    run_dir: Path
    ds_config: dict[str, Any]
    """DeepSpeed's configuration, resolved for these ranks."""
    ranks: Ranks
    stop: StopRequest
    callbacks: tuple[Callback, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What is open while a run trains; none of it is replaced."""

    ranks: Ranks
    stop: StopRequest
    cells: MaskedCells
    model: ScLong
    engine: Engine
    gradient_norms: GradientNorms
    tracker: Tracker
    watchdog: Watchdog
    callbacks: Callbacks


@dataclass(slots=True, kw_only=True)
class Counted:
    """What changes from step to step."""

    state: TrainState
    guard: StepGuard
    rank_times: RankTimes
    skipped_cells: int
    """Damaged cells that this process has trained without, over all ranks."""

    @classmethod
    def at(cls, state: TrainState, settings: RunSection) -> Counted:
        """Return what is counted before the first step of a start.

        Args:
            state: The state that it begins with.
            settings: Section run.
        """
        guard = StepGuard(
            spike_zscore=settings.spike_zscore,
            spike_window=settings.spike_window,
            max_skipped_in_a_row=settings.max_skipped_steps,
        )
        return cls(state=state, guard=guard, rank_times=RankTimes(), skipped_cells=0)


def summary(given: Given, opened: Opened, state: TrainState) -> dict[str, Any]:
    """Return what run.json records about the run, for the report."""
    corpus = opened.cells.corpus
    return {
        "n_cells_train": len(corpus.splits["train"]),
        "n_cells_validation": len(corpus.splits["validation"]),
        "n_genes": len(corpus.genes),
        "n_datasets": len(corpus.datasets),
        "expression_bins": bin_labels(),
        "parameters": parameters_by_part(opened.model),
        "corpus": corpus.location.url,
        "world_size": given.ranks.world_size,
        "device": device_name(given.ranks.device),
        "ds_config": given.config.engine.ds_config,
        "corpus_hash": state.corpus_hash,
        "genes_hash": state.genes_hash,
        "graph_hash": state.graph_hash,
        "features_hash": state.features_hash,
        "weights_hash": state.weights_hash,
    }


def training_run(given: Given, opened: Opened, state: TrainState) -> TrainingRun:
    """Return what callbacks are told of a run when it starts.

    Args:
        given: What the start is given.
        opened: What the run has open.
        state: The state that it begins with.
    """
    return TrainingRun(
        run_dir=given.run_dir,
        config=given.config,
        model=opened.model,
        rank=given.ranks.rank,
        world_size=given.ranks.world_size,
        step=state.step,
        stop=given.stop.ask,
    )


def parameters_by_part(model: ScLong) -> dict[str, int]:
    """Return the number of parameters of each part of the model."""
    return {name: count_parameters(part) for name, part in model.named_children()}


def device_name(device: torch.device) -> str:
    """Return the human-readable name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe(given: Given, corpus: Corpus, model: ScLong) -> None:
    """Log at the start what will run."""
    config, ranks, e = given.config, given.ranks, given.config.engine
    accumulated = given.ds_config["gradient_accumulation_steps"]
    stage = given.ds_config["zero_optimization"]["stage"]
    log.info("configuration:\n%s", to_yaml(config).rstrip())
    log.info(
        "corpus: %s, %s, %s, %s",
        counted(len(corpus.splits["train"]), "training cell"),
        counted(len(corpus.splits["validation"]), "validation cell"),
        counted(len(corpus.genes), "gene"), counted(len(corpus.datasets), "dataset"),
    )  # fmt: skip
    parts = parameters_by_part(model)
    log.info(
        "parameters: %s (%s)",
        f"{sum(parts.values()):,}",
        ", ".join(f"{k} {v:,}" for k, v in parts.items()),
    )
    log.info(
        "batch: %s = %d a micro-batch x %s x %s; ZeRO stage %d, %s, on %s",
        counted(e.train_batch_size, "cell"), e.train_micro_batch_size_per_gpu,
        counted(accumulated, "accumulation step"), counted(ranks.world_size, "rank"),
        stage, e.precision, device_name(ranks.device),
    )  # fmt: skip
    describe_schedule(config.optim, max_steps=config.run.max_steps, warns=ranks.rank == 0)
    log.info("attention: %s", attention_path(e, model, device=ranks.device))
    describe_products(e, model, device=ranks.device)
    if ranks.rank == 0 and e.precision == "bf16" and stage == 1 and accumulated > 1:
        log.warning(
            "ZeRO stage 1 adds the gradients of %d micro-steps up in bf16; stages 2 and 3 do in "
            "fp32: use engine.ds_config=zero2, or larger micro-batches",
            accumulated,
        )


def describe_schedule(config: OptimConfig, *, max_steps: int, warns: bool) -> None:
    """Log the learning rate over the run, and whether the run ends before its schedule does."""
    steps, optim = max_steps, config.in_steps(max_steps)
    last = learning_rate(optim, steps - 1)
    log.info(
        "learning rate: warm-up %s, at most %.3g, %.3g (%.0f%%) in the last of %s",
        counted(int(optim.warmup_steps), "step"), optim.lr, last, 100 * last / optim.lr,
        counted(steps, "step"),
    )  # fmt: skip
    warning = unfinished_schedule(config, max_steps=max_steps)
    if warns and warning is not None:
        log.warning("%s", warning)


def describe_products(engine: EngineConfig, model: ScLong, *, device: torch.device) -> None:
    """Check that `engine.linear_products` can run here, and log it where it is set.

    Raises:
        ValueError: It cannot, or no layer would multiply so.
    """
    how, on_cpu = engine.linear_products, device.type == "cpu"
    has_fp8 = (
        how == "fp8"
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    )
    check_products(
        how, device=device_name(device), on_cpu=on_cpu, has_fp8=has_fp8, model=model.config
    )
    if how == "bf16":
        log.info("linear layers: products in bf16")
    elif how == "fp8":
        emulated = " (emulated on a CPU, slower)" if on_cpu else ""
        log.info("linear layers of the large encoder: products in fp8%s", emulated)


def attention_path(engine: EngineConfig, model: ScLong, *, device: torch.device) -> str:
    """Return what computes the attention of this run, as readable text.

    Raises:
        ValueError: The backend that was asked for cannot run here.
    """
    stacks = model.performers()
    exact = [name.replace("_", " ") for name, stack in stacks.items() if not stack.favor]
    if len(exact) == len(stacks):
        return "exact softmax"
    beside = f"; exact softmax in {' and '.join(exact)}" if exact else ""
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    obstacles = set()
    for performer in (stack for stack in stacks.values() if stack.favor):
        q = torch.empty(1, 1, 1, performer.config.dim_head, dtype=dtype, device=device)
        features = performer.features(device)[0]
        obstacles.add(triton_obstacle(q, features, model.config.stabiliser_scope))
    reasons = "; ".join(sorted(reason for reason in obstacles if reason))
    backend = engine.attention_backend
    if backend == "triton" and reasons:
        raise ValueError(f"engine.attention_backend=triton: {reasons}; set it to auto or torch")
    if backend != "torch" and not reasons:
        return f"FAVOR+, Triton kernels{beside}"
    return f"FAVOR+, plain torch ({reasons or 'as set'}){beside}"
