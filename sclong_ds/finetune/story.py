"""The story of a fine-tuning: cells, baselines, fits of all folds and seeds, the table, the model.

Every rank goes through it; rank 0 writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from sclong_ds.embedding.cells import Cells
from sclong_ds.embedding.embed import pooled_counts, recipe_rows
from sclong_ds.embedding.opening import cells_of, choose_device
from sclong_ds.engine.deepspeed_engine import quiet_deepspeed
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.engine.ranks import Ranks, join_process_group, on_first_rank
from sclong_ds.exported.head import HeadShape
from sclong_ds.exported.manifest import weights_hash
from sclong_ds.exported.model_dir import load_model
from sclong_ds.exported.training_cells import read_training_cells, share_in_training
from sclong_ds.files.atomic import Lock, read_file, write_atomic
from sclong_ds.files.npz import read_npz, write_npz
from sclong_ds.finetune.examples import Examples, choose_examples
from sclong_ds.finetune.fit import Fitted, Plan, fit, mean_steps
from sclong_ds.finetune.scored.compare import Fold, Outcome, compare
from sclong_ds.finetune.sections import Sections
from sclong_ds.finetune.setting import Options, Setting
from sclong_ds.finetune.trainee import Trainee, check_stacks
from sclong_ds.finetune.written.results import write_results
from sclong_ds.hub.hub import model_folder
from sclong_ds.job import failures
from sclong_ds.job.exit_status import STOP_STATUS
from sclong_ds.job.signals import StopRequest
from sclong_ds.job.starting import Starting
from sclong_ds.job.watchdog import PATIENCE, Watchdog
from sclong_ds.model.pooling import Part
from sclong_ds.progress import count_progress, stage_progress
from sclong_ds.run_folder.identity import node_name
from sclong_ds.run_folder.lock import lock_run_folder
from sclong_ds.tracking.check import check_tracking
from sclong_ds.tracking.client import Status
from sclong_ds.tracking.tracker import Tracker

IDENTITY, FEATURES = "finetune.json", "features.npz"
PARTS = (
    Part("decoder", "value"), Part("decoder", "value^3"), Part("encoders", "value"),
    Part("encoders", "value^3"), Part("gene_vectors", "value"), Part("gene_vectors", "value^3"),
)  # fmt: skip
"""What every head but that of `frozen` reads."""
_log = logging.getLogger(__name__)


def execute(args: argparse.Namespace, config: Sections) -> int:
    """Fine-tune; returns the exit status."""
    choose_device(args.device)
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    stop = StopRequest()
    try:
        quiet_deepspeed()
        with Starting(stop, rank=rank, node=node_name()) as starting:
            starting.of_run(None, timeout_s=config.engine.timeout_s)
            ranks = join_process_group(timeout_s=8 * config.engine.timeout_s, watch=starting)
        return Story(args, config, ranks, stop).tell()
    except (ValueError, OSError, RuntimeError) as error:
        return failures.report(error, args.out)
    finally:
        stop.release()


class Story:
    """A fine-tuning from the opened input to the written results.

    Args:
        args: Arguments of the command.
        config: Settings of engine, optimizer, checkpoints and tracking.
        ranks: The ranks.
        stop: Whether somebody asked to stop.
    """

    def __init__(
        self, args: argparse.Namespace, config: Sections, ranks: Ranks, stop: StopRequest
    ) -> None:
        self.args, self.config, self.ranks, self.stop = args, config, ranks, stop
        self.out: Path = args.out
        args.model_dir = model_folder(args.model_dir)
        self.model = load_model(args.model_dir, device=ranks.device)
        self.cells: Cells = cells_of(args, self.model)
        self.examples: Examples = choose_examples(
            self.cells, label=args.label, group=args.group, regress=args.regress, n_folds=args.folds
        )
        self.options = Options(
            mode=args.mode, balanced=args.balance == "balanced",
            patience=args.patience or (20 if args.mode in ("frozen", "head") else 3),
            max_epochs=args.max_epochs or (200 if args.mode in ("frozen", "head") else 20),
            stacks=tuple(filter(None, args.stacks.split(","))), rank=args.rank,
            lora_scale=args.lora_scale, unknown_rate=args.unknown_rate, penalty=args.penalty,
        )  # fmt: skip
        if self.options.mode == "lora":
            check_stacks(self.model, self.options.stacks)
        self.known = read_training_cells(args.model_dir)
        used = self.examples.counts[np.flatnonzero(self.examples.used)]
        self.n_known = 0 if self.known is None else int(self.known.hold(used).sum())
        self.n_used = used.shape[0]
        self.watchdog = Watchdog(
            self.out / "heartbeat", rank=ranks.rank, world_size=ranks.world_size,
            timeout_s=config.engine.timeout_s, node=node_name(),
        )  # fmt: skip
        self.tracker = Tracker(
            config.tracking, self.out, enabled=ranks.rank == 0, samples_node=ranks.local_rank == 0
        )
        self.offset = 0
        """Steps of the fits that are done."""

    def tell(self) -> int:
        """Do all of it; returns the exit status."""
        self.say(share_in_training(self.known, self.n_known, self.n_used))
        on_first_rank(lambda: check_tracking(self.config.tracking, self.out))
        held: list[Lock] = []
        resumed = on_first_rank(lambda: self._open(held))
        summary = {"world_size": self.ranks.world_size, "device": str(self.ranks.device)}
        self.tracker.start(
            params={"finetune": self._facts()},
            tags={
                "finetune.label": self.args.label, "mlflow.source.name": "sclong_ds finetune",
            },
            artifacts=[self.out / "config.yaml", self.out / IDENTITY], resumed=resumed,
            summary=summary,
        )  # fmt: skip
        outcome: Status = "FAILED"
        try:
            self.tracker.event("resume" if resumed else "start", step=0, **summary)
            with self.watchdog:
                outcome = "FINISHED" if self._fit_all() else "KILLED"
        finally:
            self.tracker.event("finish", step=self.offset, outcome=outcome)
            self.tracker.finish(outcome)
            for lock in held:
                lock.release()
        if outcome == "KILLED":
            reason = self.stop.reason() or "another rank"
            _log.info("stopped by %s after saving; start the same command again", reason)
            return STOP_STATUS
        return 0

    def say(self, text: str) -> None:
        """Print a line of the result on rank 0."""
        if self.ranks.rank == 0:
            print(text)

    def _facts(self) -> dict[str, Any]:
        """Return what makes this fine-tuning what it is."""
        config = self.config
        return {
            "model": weights_hash(self.args.model_dir),
            "cells": self.examples.identity(),
            "label": self.args.label,
            "group": self.args.group,
            "folds": self.args.folds,
            "seeds": self.args.seeds,
            "seed": self.args.seed,
            "dropout": self.args.dropout,
            "regress": self.args.regress,
            **asdict(self.options),
            "stacks": list(self.options.stacks),
            "optim": asdict(config.optim) | {"betas": list(config.optim.betas)},
            "precision": config.engine.precision,
            "train_batch_size": config.engine.train_batch_size,
        }

    def _open(self, held: list[Lock]) -> bool:
        """Make the folder or continue in it; returns whether it was there.

        Raises:
            ValueError: It is of another fine-tuning.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        held.append(lock_run_folder(self.out, wait_s=60))
        facts, path = self._facts(), self.out / IDENTITY
        if path.exists():
            before = json.loads(read_file(path))
            named = {"balanced": "balance", "cells": "INPUT", "model": "MODEL_DIR"}
            changed = [named.get(k, k) for k, value in facts.items() if before.get(k) != value]
            if changed:
                raise ValueError(
                    f"--out {self.out} holds a fine-tuning with another {', '.join(changed)}; give "
                    "another --out, or the same arguments to continue"
                )
            return True
        if any(p.name not in ("heartbeat", ".lock", "lock") for p in self.out.iterdir()):
            raise ValueError(f"--out {self.out} is not empty; give another --out")
        write_atomic(self.out / "config.yaml", self.config.text.encode())
        self.model.genes.write(self.out / "genes.tsv")
        write_atomic(path, (json.dumps(facts, indent=1) + "\n").encode())
        return False

    def _shape(self) -> HeadShape:
        frozen = self.options.mode == "frozen"
        return HeadShape(
            parts=self.model.recipe.parts if frozen else PARTS,
            base_dim=self.model.config.base_dim,
            n_outputs=self.examples.width,
            hidden=self.args.hidden,
            dropout=self.args.dropout,
        )

    def _fit_all(self) -> bool:
        """Fit all folds and seeds, compare, fit the last one, write; False: asked to stop."""
        shape = self._shape()
        features, embedded = self._features(shape)
        with stage_progress("steps") if self.ranks.rank == 0 else nullcontext(_nothing) as on_step:
            setting = self._setting(shape, features, on_step)
            found: list[Fold] = []
            plans = [
                (seed, fold)
                for seed in range(self.args.seed, self.args.seed + self.args.seeds)
                for fold in range(self.examples.n_folds)
            ]
            for number, (seed, fold) in enumerate(plans):
                done = self._fit(setting, self._plan(setting, number, seed, fold))
                if done is None:
                    return False
                found.append(Fold(seed=seed, fold=fold, fitted=done[0]))
            self.watchdog.beat(self.offset, "baselines", patience=PATIENCE)
            outcome = on_first_rank(lambda: self._compare(setting, found, embedded))
            last = self._fit(setting, self._last_plan(setting, len(plans), found))
            if last is None:
                return False
        self.watchdog.beat(self.offset, "results", patience=PATIENCE)
        on_first_rank(lambda: self._write(setting, outcome, *last, embedded))
        return True

    def _setting(self, shape: HeadShape, features: NDArray[np.float32], on_step: Any) -> Setting:
        """Return what all fits share."""
        facts = json.dumps(self._facts(), sort_keys=True)
        return Setting(
            config=self.config,
            ds_config=resolve_ds_config(self.config.engine, world_size=self.ranks.world_size),
            options=self.options, ranks=self.ranks, examples=self.examples,
            model_dir=self.args.model_dir, target_sum=self.model.transform.target_sum,
            masks=self.model.transform.unmeasured == "mask", shape=shape, features=features,
            out=self.out, identity=hashlib.sha256(facts.encode()).hexdigest(),
            genes_hash=self.model.genes.hash, stop=self.stop, watchdog=self.watchdog,
            log=self.tracker.log, on_step=on_step, batch=self.args.batch_size,
        )  # fmt: skip

    def _features(self, shape: HeadShape) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return features (N, F) and embeddings (N, W) of all cells by the model as it is."""
        parts = tuple(dict.fromkeys((*shape.parts, *self.model.recipe.parts)))
        path = self.out / FEATURES
        if on_first_rank(path.is_file):
            pooled = read_npz(path, cure="remove it")["pooled"]
        else:
            pooled = self._pooled(parts)
            on_first_rank(lambda: write_npz(path, pooled=pooled))
        width = self.model.config.base_dim
        columns = {part: slice(i * width, (i + 1) * width) for i, part in enumerate(parts)}
        features = np.concatenate([pooled[:, columns[part]] for part in shape.parts], axis=1)
        rows = [pooled[:, columns[part]] for part in self.model.recipe.parts]
        return features, recipe_rows(self.model, rows)

    def _pooled(self, parts: tuple[Part, ...]) -> NDArray[np.float32]:
        """Return parts (N, P C) of all cells, each rank encoding a share."""
        world, rank = self.ranks.world_size, self.ranks.rank
        n_cells = self.examples.counts.shape[0]
        rows = np.arange(n_cells)[rank::world]
        with count_progress("encode", len(rows), "cells") as on_cells:

            def done(n: int) -> None:
                self.watchdog.beat(0, "encode")
                on_cells(n)

            mine = pooled_counts(
                self.model, self.examples.counts[rows], parts, batch_size=self.args.batch_size,
                on_cells=done,
                measured=None if self.cells.measured is None else self.cells.measured.of(rows),
            )  # fmt: skip
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, mine, group=self.ranks.control)
        pooled = np.zeros((n_cells, mine.shape[1]), np.float32)
        for other, part in enumerate(everyone):
            pooled[other::world] = part
        return pooled

    def _plan(self, setting: Setting, number: int, seed: int, fold: int) -> Plan:
        """Return the plan of the fit of one seed and fold."""
        train, held, test = self.examples.parts_of(fold)
        held = held[setting.known(held, train)]
        every = max(1, -(-len(train) // self.config.engine.train_batch_size))
        return Plan(
            name=f"seed{seed}_fold{fold + 1}", number=number, seed=seed, train=train, held=held,
            wanted=np.concatenate([held, test]), max_steps=every * self.options.max_epochs,
            every=every, offset=self.offset,
        )  # fmt: skip

    def _last_plan(self, setting: Setting, number: int, found: list[Fold]) -> Plan:
        """Return the plan of the fit of all groups, as long as the others took in the median."""
        train = np.flatnonzero(self.examples.used)
        rest = np.flatnonzero(~self.examples.used)
        steps = mean_steps([fold.fitted for fold in found])
        return Plan(
            name="final", number=number, seed=self.args.seed, train=train,
            held=np.zeros(0, np.int64), wanted=rest, max_steps=steps,
            every=max(1, -(-len(train) // self.config.engine.train_batch_size)),
            offset=self.offset, keep=True,
        )  # fmt: skip

    def _fit(self, setting: Setting, plan: Plan) -> tuple[Fitted, Trainee | None] | None:
        """Make one fit and count its steps."""
        done = fit(setting, plan)
        if done is not None:
            self.offset += done[0].n_steps
            self.tracker.event(
                "fit", step=self.offset, fit=plan.name, best_step=done[0].best_step,
            )  # fmt: skip
        return done

    def _compare(
        self, setting: Setting, found: list[Fold], embedded: NDArray[np.float32]
    ) -> Outcome:
        with count_progress("baselines", 2 * self.examples.n_folds, "fits") as on_fit:
            return compare(setting, found, embedded=embedded, on_fit=lambda: on_fit(1))

    def _write(
        self,
        setting: Setting,
        outcome: Outcome,
        last: Fitted,
        trainee: Trainee | None,
        embedded: NDArray[np.float32],
    ) -> None:
        assert trainee is not None
        leak = share_in_training(self.known, self.n_known, self.n_used)
        lines = write_results(
            setting, outcome, last, trainee, self.cells, args=self.args, leak=leak,
            known=self.known, embedded=embedded,
        )  # fmt: skip
        print("\n".join(lines))


def _nothing(stage: str, done: int, total: int) -> None:
    """Show no progress: another rank does."""
