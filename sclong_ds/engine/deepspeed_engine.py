"""DeepSpeed: ds_configs/*.json, process group, partitioned model, optimizer and schedule.

The JSON has "auto" for every number that is set in the run's YAML; a literal there is an error,
and so is an unknown key: DeepSpeed itself ignores both. Sources: DeepSpeed configuration
reference; `docs` of deepspeed.zero.Init.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn

from sclong_ds.config.sections import OptimConfig
from sclong_ds.engine.extensions import Waits, load_extension
from sclong_ds.engine.schedule import learning_rate
from sclong_ds.engine.zero3_calls import mark_ranges, spare_calls

Model = TypeVar("Model", bound=nn.Module)
Engine: TypeAlias = Any
"""An engine of DeepSpeed, which has no types; so are its optimizer and its sub-modules."""

log = logging.getLogger(__name__)


def build_partitioned(make: Callable[[], Model], *, seed: int, ds_config: dict[str, Any]) -> Model:
    """Build the model with the same weights on every rank.

    Under ZeRO-3 no rank ever holds all of them.

    Args:
        make: Builds the model.
        seed: Seeds the initial weights.
        ds_config: The resolved DeepSpeed configuration.
    """
    # The same seed on all ranks: DeepSpeed broadcasts parameters, but nothing else, from rank 0.
    torch.manual_seed(seed)
    partitioned = ds_config["zero_optimization"]["stage"] == 3
    with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=partitioned):
        return make()


def fill_parameters(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Replace the weights of a model that `build_partitioned` made; every rank must call it.

    Args:
        model: The model.
        read: Gives the weight of a name.
    """
    for name, parameter in model.named_parameters():
        _overwrite(parameter, partial(read, name))


def fill_master_weights(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Replace the fp32 weights behind bf16 parameters after `initialize`; every rank must call it.

    DeepSpeed makes them from the bf16 parameters, which would round what was read.

    Args:
        model: The model, initialised.
        read: Gives the weight of a name.
    """
    for name, parameter in model.named_parameters():
        safe_set_full_fp32_param(parameter, read(name).to(parameter.device))


def limit_norm(parameter: nn.Parameter, max_norm: float) -> None:
    """Shorten a parameter and its fp32 weights to a norm; every rank must call it after a step.

    Args:
        parameter: A parameter of an initialised model, partitioned or not.
        max_norm: Largest norm.
    """
    full = safe_get_full_fp32_param(parameter)
    norm = full.norm()
    if norm <= max_norm:
        return
    short = full * (max_norm / (norm + 1e-7))
    safe_set_full_fp32_param(parameter, short)
    # Also what the next forward pass reads, or a resumed run would start from another rounding.
    _overwrite(parameter, lambda: short)


def _overwrite(parameter: nn.Parameter, value: Callable[[], Tensor]) -> None:
    """Replace a parameter's values; of a partitioned one, rank 0 alone asks for them."""
    partitioned = hasattr(parameter, "ds_id")
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
        if not partitioned or dist.get_rank() == 0:
            parameter.data.copy_(value())


def gather_at_once(model: nn.Module, kinds: list[type[nn.Module]]) -> None:
    """Let ZeRO-3 gather the weights of each module of these kinds together, where it is called.

    Unasked it does so for every linear layer and norm, whose hooks cost more host time than the
    arithmetic of a small layer.

    Args:
        model: A partitioned model, before `initialize`.
        kinds: Classes of its modules; a part of one of them is no longer gathered by itself.
    """
    deepspeed.utils.set_z3_leaf_modules(model, kinds)


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, those that ZeRO-3 has partitioned included."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def initialize(
    model: nn.Module, *, optim: OptimConfig, ds_config: dict[str, Any], waits: Waits = log.debug
) -> Engine:
    """Wrap the model in a DeepSpeed engine with its optimizer.

    Args:
        model: The model.
        optim: The `optim` section.
        ds_config: The resolved DeepSpeed configuration.
        waits: Told what this process waits for.

    Returns:
        The DeepSpeed engine.
    """
    groups = parameter_groups(model, optim)
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        # Offloaded states are updated on the CPU; this optimizer is compiled with g++ at first use.
        load_extension("CPUAdamBuilder", waits=waits)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, adamw_mode=optim.name == "adamw", **settings
        )
    else:
        optimizer = torch_optimizer(groups, optim.name, **settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    mark_ranges(False)
    if ds_config["zero_optimization"]["stage"] == 3:
        autocast = bool(ds_config.get("torch_autocast", {}).get("enabled"))
        spare_calls(model, autocast=autocast)
    return engine


def torch_optimizer(
    groups: list[dict[str, Any]], name: Literal["adam", "adamw"], **settings: Any
) -> torch.optim.Optimizer:
    """Return torch's own fused optimizer: DeepSpeed's needs nvcc on every node.

    On a CPU it takes a fifth of the time of one operator after another, and no copies of the
    moments.

    Args:
        groups: Of `parameter_groups`.
        name: adam or adamw.
        **settings: Rate, betas and eps.
    """
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    fused = get_accelerator().device_name() in ("cuda", "cpu")
    return kind(groups, fused=fused, **settings)


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Split the trained parameters: matrices are decayed, biases, norms and vectors are not.

    Args:
        model: The model, partitioned or not.
        optim: The `optim` section.

    Returns:
        Two optimizer groups named `decay` and `no_decay`.
    """
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        # A partitioned parameter is flat; ds_shape is its real shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        groups["decay" if len(shape) >= 2 else "no_decay"].append(parameter)
    decay = {"decay": optim.weight_decay, "no_decay": 0.0}
    return [{"params": p, "weight_decay": decay[name], "name": name} for name, p in groups.items()]


def set_hyper_parameters(engine: Engine, optim: OptimConfig, step: int, *, max_steps: int) -> float:
    """Set the step's learning rate and each group's decay; returns the learning rate.

    Both are set before every step, so that neither depends on what a checkpoint's optimizer state
    says.

    Args:
        engine: The DeepSpeed engine.
        optim: The `optim` section.
        step: Number of steps applied before this one.
        max_steps: Steps of the run.
    """
    lr = learning_rate(optim.in_steps(max_steps), step)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = optim.weight_decay if group["name"] == "decay" else 0.0
    return lr


def quiet_deepspeed() -> None:
    """Silence DeepSpeed's messages below warnings.

    Also torch's at each collective that DeepSpeed calls by its old name.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: of the GPU, or of the process on a CPU.

    Args:
        device: The rank's device.
    """
    if device.type == "cpu":
        # Not getrusage: its maximum begins with what the parent held when it started the process.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    return get_accelerator().max_memory_allocated() / 2**30
