"""The fastest setting that fits: ZeRO stage, recomputation and micro-batch.

What a setting changes is speed and memory alone: the losses of a run are the same to rounding. The
optimizer is offloaded only where nothing fits without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from sclong_ds.config.sections import EngineConfig, ModelConfig, ObjectiveConfig
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.objective.targets import target_count
from sclong_ds.planning.costs import (
    Products,
    parameter_counts,
    recompute_flops_per_cell,
    rounded_sizes,
    stacks,
    training_flops_per_cell,
)
from sclong_ds.planning.devices import Device, check_products
from sclong_ds.planning.memory import (
    Setup,
    Zero,
    activation_bytes,
    memory_per_rank,
    zero_settings,
)
from sclong_ds.planning.step_time import FewerBits, Site, StepTime, Work, step_time

IN_MEMORY, OFFLOADED = ("zero3", "zero2", "zero1"), "zero3_offload"
"""The shipped DeepSpeed JSONs."""
AS_FAST = 1.02
"""Settings within this of the fastest count as fast."""
ROOMY = 0.8
"""Share of the usable memory up to which a setting leaves room for what was not predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a run is planned for."""

    n_genes: int
    n_edges: int
    """Edges of the gene graph; 0 without one."""
    cells: int
    """Training cells of one epoch."""
    n_expressed: int
    """Expressed genes of a cell, on average."""

    def wanted(self, objective: ObjectiveConfig) -> dict[str, int]:
        """Return expressed and predicted genes of an average cell, as `planning.costs` takes them.

        Args:
            objective: Which genes are hidden and predicted.
        """
        return {
            "n_expressed": self.n_expressed,
            "n_wanted": target_count(self.n_expressed, objective),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A setting, and what it is predicted to need."""

    ds_config: str
    activation_checkpointing: bool
    micro_batch: int
    peak_bytes: int
    time: StepTime

    def overrides(self, engine: EngineConfig) -> list[str]:
        """Return what to add to a command line that has another setting; empty: nothing.

        Args:
            engine: The setting that is configured.
        """
        wanted = {
            "ds_config": self.ds_config,
            "activation_checkpointing": self.activation_checkpointing,
            "train_micro_batch_size_per_gpu": self.micro_batch,
        }
        return [
            f"engine.{key}={str(value).lower()}"
            for key, value in wanted.items()
            if getattr(engine, key) != value
        ]


@dataclass(frozen=True, slots=True)
class Chooser:
    """Compares the settings of `engine` for a model on a site."""

    model: ModelConfig
    engine: EngineConfig
    objective: ObjectiveConfig
    site: Site
    device: Device
    work: Workload

    @property
    def setup(self) -> Setup:
        """On what the run is planned."""
        site, work = self.site, self.work
        return Setup(
            site.world_size, site.device == "cpu", work.n_genes, work.n_edges,
            **work.wanted(self.objective), products=self.engine.linear_products,
        )  # fmt: skip

    @property
    def element_bytes(self) -> int:
        """Bytes of a number of the model."""
        return 2 if self.engine.precision == "bf16" else 4

    def time(self, zero: Zero, *, recompute: bool, micro_batch: int) -> StepTime:
        """Predict the time of a step.

        Args:
            zero: Stage and offloading.
            recompute: Whether activation checkpointing is on.
            micro_batch: Cells of a rank's forward pass.
        """
        model, work, cell = self.model, self.work, self.work.wanted(self.objective)
        flops = training_flops_per_cell(
            model, work.n_genes, work.n_edges, micro_batch=micro_batch, **cell
        )
        again = recompute_flops_per_cell(model, work.n_genes, **cell) if recompute else 0
        kept = activation_bytes(
            model, work.n_genes, element_bytes=self.element_bytes, recompute=False,
            n_expressed=cell["n_expressed"], n_wanted=cell["n_wanted"],
        )  # fmt: skip
        return step_time(
            Work(
                parameters=sum(parameter_counts(model, work.n_genes).values()),
                layers=sum(stack.depth for stack, _, _ in stacks(model, work.n_genes).values()),
                element_bytes=self.element_bytes,
                training_flops=flops,
                recompute_flops=again,
                kept_bytes=sum(kept.values()),
                fewer_bits=self._fewer_bits(),
            ),
            zero,
            self.device,
            self.site,
            precision=self.engine.precision,
            step_cells=self.engine.train_batch_size,
            micro_batch=micro_batch,
        )

    def of_fewer_bits(self, zero: Zero) -> dict[str, float]:
        """Return how many times as fast the step is with products in fewer bits, by overrides.

        Only what the device can do and is meant for it; on a CPU, which emulates 8-bit floats, they
        are here if they are configured.

        Args:
            zero: Stage and offloading.
        """
        engine, on_cpu = self.engine, self.setup.on_cpu
        again, micro = engine.activation_checkpointing, engine.train_micro_batch_size_per_gpu

        def step_s(products: Products, *, compiled: bool) -> float:
            changed = dataclasses.replace(engine, linear_products=products, compile_layers=compiled)
            other = dataclasses.replace(self, engine=changed)
            return other.time(zero, recompute=again, micro_batch=micro).step_s

        found = {}
        wanted: Products = "bf16" if on_cpu else "fp8"
        for products in dict.fromkeys((wanted, engine.linear_products)):
            if products == "precision" or not self._can_multiply(products):
                continue
            for compiled in (False, True):
                name = f"engine.linear_products={products}"
                name += " engine.compile_layers=true" if compiled else ""
                base = step_s("precision", compiled=compiled)
                found[name] = base / step_s(products, compiled=compiled)
        return found

    def _can_multiply(self, products: Products) -> bool:
        if products == "bf16" and self.engine.precision == "bf16":
            return False
        try:
            self.check_products(products)
        except ValueError:
            return False
        return True

    def check_products(self, products: Products) -> None:
        """Check that the device can multiply as `engine.linear_products` tells.

        Args:
            products: The setting.

        Raises:
            ValueError: It cannot, or no layer would multiply so.
        """
        check_products(
            products, device=self.site.device, on_cpu=self.setup.on_cpu,
            has_fp8=self.device.fp8_tflops > 0, model=self.model,
        )  # fmt: skip

    def _fewer_bits(self) -> FewerBits | None:
        how, work = self.engine.linear_products, self.work
        if how == "precision":
            return None
        sizes = rounded_sizes(self.model, work.n_genes, how, **work.wanted(self.objective))
        return FewerBits(products=how, sizes=sizes, compiled=self.engine.compile_layers)

    def fastest(self) -> Choice | None:
        """Return the fastest setting that fits; None: none does.

        Of those within `AS_FAST` of the fastest it is the configured one, if it is among them; else
        the one where Python and the links are shortest beside the arithmetic, since those hold a
        GPU up when they take longer than predicted, and of these one that is `ROOMY` if any is.
        """
        fitting: list[Choice] = []
        names = dict.fromkeys((self.engine.ds_config, *IN_MEMORY, OFFLOADED))
        settings = {name: self._zero(name) for name in names}
        for offloaded in (False, True):
            fitting = [
                choice
                for name, zero in settings.items()
                if zero.offload_optimizer == offloaded
                for choice in self._fitting(name, zero)
            ]
            if fitting:
                break
        if not fitting:
            return None
        best = min(choice.time.step_s for choice in fitting)
        good = [choice for choice in fitting if choice.time.step_s <= AS_FAST * best]
        usable = self.device.usable_bytes()
        return min(
            good,
            key=lambda choice: (
                len(choice.overrides(self.engine)) > 0,
                choice.peak_bytes > ROOMY * usable,
                max(choice.time.host_s, choice.time.links_s) / choice.time.compute_s,
                choice.peak_bytes,
            ),
        )

    def _fitting(self, name: str, zero: Zero) -> Iterator[Choice]:
        """Yield the settings of a DeepSpeed JSON that fit."""
        world, usable = self.site.world_size, self.device.usable_bytes()
        share = self.engine.train_batch_size // world
        for recompute in (False, True):
            for micro in (m for m in range(1, share + 1) if share % m == 0):
                memory = memory_per_rank(
                    self.model, zero, self.setup, micro_batch=micro,
                    element_bytes=self.element_bytes, recompute=recompute,
                )  # fmt: skip
                peak = memory.filled(on_cpu=self.setup.on_cpu)
                if peak > usable:
                    break
                yield Choice(
                    ds_config=name, activation_checkpointing=recompute, micro_batch=micro,
                    peak_bytes=peak,
                    time=self.time(zero, recompute=recompute, micro_batch=micro),
                )  # fmt: skip

    def _zero(self, name: str) -> Zero:
        engine = dataclasses.replace(self.engine, ds_config=name, train_micro_batch_size_per_gpu=1)
        return zero_settings(resolve_ds_config(engine, world_size=self.site.world_size))
