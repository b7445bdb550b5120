"""Resolves the DeepSpeed JSON of `ds_configs/`: the run's numbers in place of "auto".

Numbers that have their home in the YAML must be "auto" in the JSON; unknown keys are errors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sclong_ds.config.sections import EngineConfig
from sclong_ds.files.atomic import read_file
from sclong_ds.files.places import place_of

DS_CONFIGS_DIR = place_of("ds_configs")

KNOWN_KEYS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
    "bf16 zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
    "communication_data_type prescale_gradients gradient_predivide_factor disable_allgather "
    "data_types activation_checkpointing aio comms_logger flops_profiler wall_clock_breakdown "
    "memory_breakdown dump_state steps_per_print torch_autocast".split()
)
"""Top-level keys of a DeepSpeed JSON that mean something here; optimizer and scheduler are set in
the YAML."""
_FROM_YAML = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
    "bf16.enabled".split()
)
"""What `resolve_ds_config` fills in."""
SHIPPED_ZERO_KEYS = frozenset(
    "stage overlap_comm contiguous_gradients reduce_bucket_size allgather_bucket_size "
    "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_max_live_parameters "
    "stage3_max_reuse_distance offload_optimizer offload_param".split()
)
"""Keys of `zero_optimization` in ds_configs/, known without DeepSpeed, whose import takes
seconds."""


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
        config = json.loads(read_file(path))
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
    assert values.keys() == _FROM_YAML
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


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two resolved configurations beside the numbers of the YAML.

    Args:
        before: One of an earlier start.
        now: That of this start.

    Returns:
        Old and new value by dotted key; None for what one of them lacks.
    """
    old, new = dict(_walk(before)), dict(_walk(now))
    return {
        name: (old.get(name), new.get(name))
        for name in {**old, **new}
        if name not in _FROM_YAML and old.get(name) != new.get(name)
    }


def _fill(config: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Replace one "auto"; a missing key is added, a literal is an error."""
    *parents, last = name.split(".")
    node = config
    for parent in parents:
        node = node.setdefault(parent, {})
    if node.get(last, "auto") != "auto":
        raise ValueError(
            f"{where}: {name} is {node[last]!r}; this number is set in the run's YAML, "
            f'write "auto" here'
        )
    node[last] = value


def _walk(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def zero_keys() -> frozenset[str]:
    """Return the keys of `zero_optimization` that the installed DeepSpeed knows."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    return frozenset(fields) | {field.alias for field in fields.values() if field.alias}


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
    zero = config.get("zero_optimization", {})
    shipped = zero.keys() <= SHIPPED_ZERO_KEYS
    levels = [
        ("", config, KNOWN_KEYS),
        ("zero_optimization.", zero, SHIPPED_ZERO_KEYS if shipped else zero_keys()),
    ]
    for prefix, tree, allowed in levels:
        for key in tree:
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, n=1)
                hint = f" (did you mean '{near[0]}'?)" if near else ""
                raise ValueError(f"{where}: {prefix}{key}: unknown key{hint}")
