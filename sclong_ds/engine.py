"""DeepSpeed: ds_configs/*.json, process group, partitioned model, optimizer and schedule.

The JSON says "auto" for every number that lives in the run's YAML; a literal there is an error, and
so is an unknown key: DeepSpeed itself ignores both. Sources: DeepSpeed configuration reference;
`docs` of deepspeed.zero.Init.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn

from sclong_ds.config.sections import EngineConfig, OptimConfig, RunConfig

DS_CONFIGS_DIR = Path(__file__).parents[1] / "ds_configs"
T = TypeVar("T")
KNOWN_KEYS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
    "bf16 zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
    "communication_data_type prescale_gradients gradient_predivide_factor disable_allgather "
    "data_types activation_checkpointing aio comms_logger flops_profiler wall_clock_breakdown "
    "memory_breakdown dump_state steps_per_print torch_autocast".split()
)
"""Top-level keys of a DeepSpeed JSON that mean something here; optimizer and scheduler live in the
YAML."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: Any = None
    """Process group for what the hosts tell each other; None: the default one."""


def resolve_ds_config(engine: EngineConfig, *, world_size: int) -> dict[str, Any]:
    """Read the DeepSpeed JSON, check its keys and fill in every "auto".

    Args:
        engine: The `engine` section.
        world_size: Number of ranks.

    Returns:
        The complete DeepSpeed configuration.

    Raises:
        FileNotFoundError: No such JSON.
        ValueError: Unknown key, a literal where "auto" belongs, an "auto" that nothing fills, or
            batch sizes that do not divide.
    """
    path = DS_CONFIGS_DIR / f"{engine.ds_config}.json"
    if not path.is_file():
        path = Path(engine.ds_config)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in DS_CONFIGS_DIR.glob("*.json")))
        raise FileNotFoundError(
            f"engine.ds_config={engine.ds_config}: no such file; shipped ones are {names}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    _check_shape(config, path.name)
    _check_keys(config, path.name)
    micro = engine.train_micro_batch_size_per_gpu
    if engine.train_batch_size % (micro * world_size):
        raise ValueError(
            f"engine.train_batch_size: got {engine.train_batch_size}, must be a multiple of "
            f"engine.train_micro_batch_size_per_gpu {micro} x {world_size} ranks"
        )
    values = {
        "train_batch_size": engine.train_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": engine.train_batch_size // (micro * world_size),
        "gradient_clipping": engine.gradient_clipping,
        "bf16.enabled": engine.precision == "bf16",
    }
    for name, value in values.items():
        _fill(config, name, value, path.name)
    left = [name for name, value in _walk(config) if value == "auto"]
    if left:
        raise ValueError(f"{path.name}: {', '.join(left)}: 'auto' has no source here; give a value")
    config.setdefault("steps_per_print", 2**31)
    if engine.precision == "bf16" and config["zero_optimization"]["stage"] > 1:
        # Sums of many micro-steps: bf16 keeps 8 bits, so a term of 1/256 of the sum is lost. With
        # stage 1 it would bring in another optimizer, whose checkpoints cannot be merged.
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return config


def _fill(config: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Replace one "auto"; a missing key is added, a literal is an error."""
    *parents, last = name.split(".")
    node = config
    for parent in parents:
        node = node.setdefault(parent, {})
    if node.get(last, "auto") != "auto":
        raise ValueError(
            f"{where}: {name} is {node[last]!r}; this number lives in the run's YAML, "
            f'write "auto" here'
        )
    node[last] = value


def _walk(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_shape(config: Any, where: str) -> None:
    """Refuse a JSON that is no mapping of sections or does not name its ZeRO stage."""
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected a mapping, got {type(config).__name__}")
    for section in ("bf16", "zero_optimization"):
        if not isinstance(config.get(section, {}), dict):
            raise ValueError(f"{where}: {section}: expected a mapping, got {config[section]!r}")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"{where}: zero_optimization.stage: got {stage}, allowed: 1, 2, 3")


def _check_keys(config: dict[str, Any], where: str) -> None:
    """Refuse keys that DeepSpeed would ignore."""
    zero_keys = set(DeepSpeedZeroConfig.model_fields)
    zero_keys |= {f.alias for f in DeepSpeedZeroConfig.model_fields.values() if f.alias}
    levels = [
        ("", config, KNOWN_KEYS),
        ("zero_optimization.", config.get("zero_optimization", {}), zero_keys),
    ]
    for prefix, tree, allowed in levels:
        for key in tree:
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, n=1)
                hint = f" (did you mean '{near[0]}'?)" if near else ""
                raise ValueError(f"{where}: {prefix}{key}: unknown key{hint}")


def join_process_group(*, timeout_s: int) -> Ranks:
    """Join the ranks named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Alone when unset.

    Args:
        timeout_s: Longest wait in a collective.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(port)})
    # DeepSpeed compiles with ninja; in an environment that was not activated it is beside the
    # interpreter, not on PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # One folder of compiled extensions per environment: two that share one rebuild it in turns.
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
        # Hidden from DeepSpeed: where all ranks are local it makes 66 MiB of shared memory for
        # each, for inference alone, and leaves them behind; where there is no room, ranks crash.
        told = os.environ.pop("LOCAL_SIZE", "0")
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", told))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, local_size)))
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(), local_rank)
    timeout = timedelta(seconds=timeout_s)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    # A collective of the GPUs would make the host wait for all work before it.
    control = None if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(rank, local_rank, int(os.environ["WORLD_SIZE"]), device, control)


def sum_over_ranks(ranks: Ranks, *values: int) -> list[int]:
    """Return sums of integers over the ranks, on the host: no GPU waits.

    Every rank must call it with as many values.

    Args:
        ranks: The ranks.
        values: This rank's numbers.
    """
    sums = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(sums, group=ranks.control)
    return sums.tolist()


def on_first_rank(action: Callable[[], T]) -> T:
    """Do something on rank 0 and give every rank its result, or its failure.

    Without this, the other ranks would wait for a rank 0 that has already given up.

    Args:
        action: What to do; its result is pickled.

    Raises:
        ValueError: What rank 0 could not do.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def build_partitioned(
    make: Callable[[], nn.Module], *, seed: int, ds_config: dict[str, Any]
) -> nn.Module:
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


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, those that ZeRO-3 has partitioned included."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def initialize(model: nn.Module, *, optim: OptimConfig, ds_config: dict[str, Any]) -> Any:
    """Wrap the model in a DeepSpeed engine with its optimizer.

    Args:
        model: The model.
        optim: The `optim` section.
        ds_config: The resolved DeepSpeed configuration.

    Returns:
        The DeepSpeed engine.
    """
    groups = parameter_groups(model, optim)
    settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        # Offloaded states are updated on the CPU; this optimizer is compiled with g++ at first use.
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, adamw_mode=optim.name == "adamw", **settings
        )
    else:
        # torch's own fused optimizer: DeepSpeed's needs nvcc on every node.
        kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
        optimizer = kind(groups, fused=get_accelerator().device_name() == "cuda", **settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return engine


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Split the parameters: matrices are decayed, biases, norms and vectors are not.

    Args:
        model: The model, partitioned or not.
        optim: The `optim` section.

    Returns:
        Two optimizer groups named `decay` and `no_decay`.
    """
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for parameter in model.parameters():
        # A partitioned parameter is flat; ds_shape is its real shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        groups["decay" if len(shape) >= 2 else "no_decay"].append(parameter)
    decay = {"decay": optim.weight_decay, "no_decay": 0.0}
    return [{"params": p, "weight_decay": decay[name], "name": name} for name, p in groups.items()]


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Return the learning rate of an optimizer step.

    Args:
        optim: The `optim` section.
        step: Number of steps applied before this one.
    """
    if optim.schedule == "warm_restarts":
        return _warm_restarts(optim, step)
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = min(1.0, (step - optim.warmup_steps) / (optim.decay_steps - optim.warmup_steps))
    floor = optim.min_lr_ratio
    return optim.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def _warm_restarts(optim: OptimConfig, step: int) -> float:
    """Return the rate of cosine cycles with warm-up, each longer and lower than the one before."""
    warmup, length, cycle = optim.warmup_steps, optim.decay_steps, 0
    while step >= length:
        step -= length
        length = int((length - warmup) * optim.cycle_mult) + warmup
        cycle += 1
    low, peak = optim.lr * optim.min_lr_ratio, optim.lr * optim.cycle_gamma**cycle
    if step < warmup:
        share = step / warmup
    else:
        share = (1 + math.cos(math.pi * (step - warmup) / (length - warmup))) / 2
    return low + (peak - low) * share


def set_hyper_parameters(engine: Any, config: RunConfig, step: int) -> float:
    """Set the step's learning rate and each group's decay; returns the learning rate.

    Both are set before every step, so that neither depends on what a checkpoint's optimizer state
    says.

    Args:
        engine: The DeepSpeed engine.
        config: The run's configuration.
        step: Number of steps applied before this one.
    """
    lr = learning_rate(config.optim, step)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = config.optim.weight_decay if group["name"] == "decay" else 0.0
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
