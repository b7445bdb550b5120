"""One fit: a trainee on the training groups of a fold, stopped early on the held-out ones.

The order of cells is a function of (seed, position), dropout of (seed, step, rank): a fit that was
stopped continues from its newest checkpoint as if it had not been, on another number of ranks to
rounding (and with other dropout). Engine, checkpoints, sums over
ranks and learning rates are those of pretraining. Every rank calls these functions.

    DIR/fits/NAME/checkpoints/   while it runs
    DIR/fits/NAME/best.safetensors, fit.json   best weights so far, also in a checkpoint
    DIR/fits/NAME/result.npz     outputs, when it is done

Shapes: N cells, n cells of a fit, F features, K outputs.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from sclong_ds.checkpoint.load import load
from sclong_ds.checkpoint.save import begin_save, finish_save
from sclong_ds.checkpoint.state import TrainState
from sclong_ds.engine.deepspeed_engine import Engine, initialize, set_hyper_parameters
from sclong_ds.engine.ranks import on_first_rank, sum_over_ranks
from sclong_ds.files.atomic import read_file, whole_file, write_atomic
from sclong_ds.files.npz import read_npz, write_npz
from sclong_ds.finetune.setting import Setting
from sclong_ds.finetune.trainee import Trainee, trainable

BEST, POSITION, RESULT = "best.safetensors", "fit.json", "result.npz"
KEPT = "weights.safetensors"
_LEAST_GAIN = 1e-3
"""Share of the best loss by which a better one is lower."""
_CURE = "remove its folder to fit again"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which cells a fit is of, and how long it may take."""

    name: str
    number: int
    """Of all fits."""
    seed: int
    train: NDArray[np.int64]
    """(n,) cells to learn from."""
    held: NDArray[np.int64]
    """Cells to stop on; none: the fit makes all of its steps."""
    wanted: NDArray[np.int64]
    """Cells whose outputs are wanted, the held ones among them."""
    max_steps: int
    every: int
    """Steps between looks at the held-out cells."""
    offset: int = 0
    """Steps of the fits before it."""
    keep: bool = False
    """Whether its weights are wanted afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a fit is."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    waited: int = 0
    """Looks since the best one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What a fit found."""

    rows: NDArray[np.int64]
    """Cells with outputs."""
    outputs: NDArray[np.float32]
    """(rows, K)."""
    features: NDArray[np.float32]
    """(rows, F) scaled features."""
    reference: NDArray[np.float32]
    """(m, F) scaled features of training cells."""
    reference_rows: NDArray[np.int64]
    """(m,) which."""
    best_step: int
    n_steps: int


def fit(setting: Setting, plan: Plan) -> tuple[Fitted, Trainee | None] | None:
    """Fit, or continue to; None: asked to stop, after saving.

    Returns:
        What was found, and the trainee with its best weights; None in its place for a fit that was
        done before and whose weights were not to be kept.
    """
    folder = setting.out / "fits" / plan.name
    if on_first_rank(lambda: (folder / RESULT).is_file()):
        return _read(folder), _kept(setting, plan, folder) if plan.keep else None
    on_first_rank(lambda: (folder / "checkpoints").mkdir(parents=True, exist_ok=True))
    trainee = setting.make_trainee(plan.seed, plan.train)
    engine = initialize(trainee, optim=setting.config.optim, ds_config=setting.ds_config)
    position, best = _resume(setting, plan, engine, folder)
    while position.step < plan.max_steps and position.waited <= setting.patience:
        setting.watchdog.beat(plan.offset + position.step + 1, "fit")
        if sum_over_ranks(setting.ranks, int(setting.stop.reason() is not None))[0]:
            _save(setting, plan, engine, folder, position, best)
            return None
        loss = _step(setting, plan, engine, position.step)
        position = replace(position, step=position.step + 1)
        setting.on_step(plan.name, position.step, plan.max_steps)
        if position.step % plan.every == 0 or position.step == plan.max_steps:
            position, best = _look(setting, plan, engine, position, best, loss)
        if position.step % setting.config.checkpoint.every_n_steps == 0:
            _save(setting, plan, engine, folder, position, best)
    for name, parameter in trainable(engine.module).items():
        parameter.data.copy_(best[name])
    found = _finish(setting, plan, engine.module, position)
    on_first_rank(lambda: _write(folder, found, best if plan.keep else None))
    return found, engine.module


def order_of(n: int, *, seed: int, start: int, stop: int) -> NDArray[np.int64]:
    """Return the cells at places [start, stop) of an endless stream of shuffled passes over n."""
    parts = []
    for epoch in range(start // n, -(-stop // n)):
        shuffled = np.random.default_rng([seed, epoch]).permutation(n)
        parts.append(shuffled[max(start - epoch * n, 0) : max(stop - epoch * n, 0)])
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _step(setting: Setting, plan: Plan, engine: Engine, step: int) -> float:
    """Do one optimizer step; returns the loss over all ranks.

    Raises:
        ValueError: It is not finite.
    """
    config, ranks = setting.config, setting.ranks
    size, micro = config.engine.train_batch_size, config.engine.train_micro_batch_size_per_gpu
    set_hyper_parameters(engine, config.optim, step, max_steps=plan.max_steps)
    batch = plan.train[
        order_of(len(plan.train), seed=plan.seed, start=step * size, stop=(step + 1) * size)
    ]
    torch.manual_seed(hash((plan.seed, step, ranks.rank)) % 2**63)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for start in range(ranks.rank * micro, size, ranks.world_size * micro):
        rows = batch[start : start + micro]
        x, unmeasured = setting.inputs(rows)
        loss = setting.loss(engine(x, unmeasured), rows, plan.train)
        engine.backward(loss + setting.options.penalty * engine.module.head.size())
        engine.step()
        total += loss.detach() * len(rows) / size
    dist.all_reduce(total)
    if not math.isfinite(total.item()):
        raise ValueError(
            f"{plan.name}: the loss of step {step + 1} is not finite; lower optim.lr "
            f"({config.optim.lr:g})"
        )
    return total.item()


@torch.no_grad()
def outputs_of(
    setting: Setting, trainee: Trainee, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return outputs (n, K) and scaled features (n, F) of cells, each rank computing a share."""
    ranks, was = setting.ranks, trainee.training
    trainee.eval()
    mine = rows[ranks.rank :: ranks.world_size]
    shape = trainee.head.shape
    found = np.zeros((len(mine), shape.n_outputs), np.float32)
    scaled = np.zeros((len(mine), shape.n_features), np.float32)
    for start in range(0, len(mine), setting.batch):
        setting.watchdog.beat(0, "held-out cells")
        part = slice(start, start + setting.batch)
        features = trainee.features(*setting.inputs(mine[part]))
        found[part] = trainee.head(features).float().cpu().numpy()
        scaled[part] = trainee.head.scaled(features).float().cpu().numpy()
    trainee.train(was)
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, (found, scaled), group=ranks.control)
    together = tuple(np.zeros((len(rows), a.shape[1]), np.float32) for a in (found, scaled))
    for rank, pair in enumerate(everyone):
        for whole, own in zip(together, pair, strict=True):
            whole[rank :: ranks.world_size] = own
    return together[0], together[1]


def _look(
    setting: Setting,
    plan: Plan,
    engine: Engine,
    position: Position,
    best: dict[str, Tensor],
    train_loss: float,
) -> tuple[Position, dict[str, Tensor]]:
    """Compare the held-out loss with the best so far; keep the weights if it is lower."""
    row = {"train/loss": train_loss, "train/lr": engine.optimizer.param_groups[0]["lr"]}
    row |= {"fit/number": plan.number, "fit/seed": plan.seed, "fit/step": position.step}
    loss = train_loss
    if len(plan.held):
        outputs, _ = outputs_of(setting, engine.module, plan.held)
        loss = setting.held_loss(outputs, plan.held, plan.train)
        row["val/loss"] = loss
    setting.log(plan.offset + position.step, row)
    if len(plan.held) and not loss < position.best_loss * (1 - _LEAST_GAIN):
        return replace(position, waited=position.waited + 1), best
    better = {n: p.detach().cpu().clone() for n, p in trainable(engine.module).items()}
    return replace(position, best_loss=loss, best_step=position.step, waited=0), better


def _finish(setting: Setting, plan: Plan, trainee: Trainee, position: Position) -> Fitted:
    """Return the outputs of the best weights."""
    outputs, features = outputs_of(setting, trainee, plan.wanted)
    some = setting.reference_cells(plan.train)
    _, reference = outputs_of(setting, trainee, some)
    return Fitted(
        rows=plan.wanted, outputs=outputs, features=features, reference=reference,
        reference_rows=some, best_step=position.best_step, n_steps=position.step,
    )  # fmt: skip


def _kept(setting: Setting, plan: Plan, folder: Path) -> Trainee:
    """Return the trainee of a fit that was done before."""
    trainee = setting.make_trainee(plan.seed, plan.train)
    weights = load_file(folder / KEPT)
    for name, parameter in trainable(trainee).items():
        parameter.data.copy_(weights[name])
    return trainee


def _write(folder: Path, found: Fitted, weights: dict[str, Tensor] | None) -> None:
    """Write the result of a fit; its checkpoints are no longer needed."""
    if weights is not None:
        _write_weights(folder / KEPT, weights)
    write_npz(folder / RESULT, **asdict(found))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in (BEST, POSITION):
        (folder / name).unlink(missing_ok=True)


def _write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    with whole_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)


def _read(folder: Path) -> Fitted:
    found: dict[str, Any] = read_npz(folder / RESULT, cure=_CURE)
    numbers = {name: int(found.pop(name)) for name in ("best_step", "n_steps")}
    return Fitted(**(found | numbers))


def _save(
    setting: Setting,
    plan: Plan,
    engine: Engine,
    folder: Path,
    position: Position,
    best: dict[str, Tensor],
) -> None:
    """Save a checkpoint of a fit, with its best weights so far."""

    def write() -> None:
        _write_weights(folder / BEST, best)
        text = asdict(position) | {"best_loss": repr(position.best_loss)}
        write_atomic(folder / POSITION, (json.dumps(text) + "\n").encode())

    on_first_rank(write)
    inputs = [setting.out / name for name in ("config.yaml", "genes.tsv")]
    finish_save(
        begin_save(
            engine,
            folder / "checkpoints",
            _state(setting, plan, position.step),
            files=[*inputs, folder / BEST, folder / POSITION],
            settings=replace(setting.config.checkpoint, keep_best=False),
            background=False,
        )
    )


def _state(setting: Setting, plan: Plan, step: int) -> TrainState:
    return TrainState(
        step=step,
        cells_seen=step * setting.config.engine.train_batch_size,
        world_size=setting.ranks.world_size,
        seed=plan.seed,
        precision=setting.config.engine.precision,
        zero_stage=setting.ds_config["zero_optimization"]["stage"],
        corpus_hash=setting.identity,
        genes_hash=setting.genes_hash,
        graph_hash=None,
        features_hash=None,
    )


def _resume(
    setting: Setting, plan: Plan, engine: Engine, folder: Path
) -> tuple[Position, dict[str, Tensor]]:
    """Load the newest good checkpoint of a fit; returns its position and best weights."""

    def accept(checkpoint: Path, found: TrainState) -> None:
        wanted = _state(setting, plan, found.step)
        for name in ("seed", "corpus_hash", "precision", "zero_stage"):
            if getattr(found, name) != getattr(wanted, name):
                raise ValueError(
                    f"{checkpoint}: {name} is {getattr(found, name)}, now "
                    f"{getattr(wanted, name)}; give another --out"
                )

    start = {name: p.detach().cpu().clone() for name, p in trainable(engine.module).items()}
    found = load(engine, folder / "checkpoints", accept=accept)
    if found is None:
        return Position(), start
    checkpoint = folder / "checkpoints" / found.name
    text = json.loads(read_file(checkpoint / POSITION))
    text["best_loss"] = float(text["best_loss"])
    _log.info("%s: resuming after step %d", plan.name, found.state.step)
    return Position(**text), dict(load_file(checkpoint / BEST))


def mean_steps(found: Sequence[Fitted]) -> int:
    """Return the median of the best steps of some fits, at least 1."""
    return max(1, int(np.median([f.best_step for f in found])))
