"""Run configuration: a frozen dataclass tree, a strict YAML loader and `key=value` overrides.

A run is described by one complete YAML file (a preset of `sclong_ds/presets/` or your own): every
key must be there, unknown keys, duplicate keys and wrong types are errors, and nothing is
inherited. `load_config("sclong_tiny", ["run.max_steps=10"])` reads a preset, applies the overrides
and returns a `RunConfig`; `to_yaml` writes it back. The configuration is never edited after it is
loaded. Each section is named after the module that consumes it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

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
    gene_encoder: Literal["graph", "embedding"]
    """graph: graph convolution over the gene graph; embedding: the same table without a graph
    (ablation)."""
    gene_encoder_layers: int
    """Graph convolution layers (1 in scLong)."""
    gene_graph: str | None
    """Path of the graph written by `python -m data_prep gene-graph`; required when gene_encoder is
    graph."""
    gene_vectors: str | None
    """Path of a (genes, base_dim) .npy that initialises the gene vectors; null: normal(0, 0.02)."""
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
    gene_bias: bool
    """One learned output bias per gene, initialised at the gene's mean expressed value in the
    training cells."""
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
    schedule: Literal["cosine", "constant"]
    """Shape after the warm-up."""
    warmup_steps: int
    """Steps of linear warm-up from 0."""
    decay_steps: int
    """Step at which cosine reaches min_lr_ratio; the rate stays there afterwards. Independent of
    run.max_steps."""
    min_lr_ratio: float
    """Final learning rate as a share of lr (cosine)."""


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
    tree = _read_yaml(path.read_text(encoding="utf-8"), path.name)
    for item in overrides:
        _apply_override(tree, item)
    config = _build(RunConfig, tree, path.name, "")
    _check(config, path.name)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration (or one section) as plain dicts, lists and scalars."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """Return the configuration (or one section) as YAML that the loader accepts."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False)


def section_from_dict(cls: type, tree: Mapping[str, Any], where: str) -> Any:
    """Build one section (say ModelConfig from an exported model's config.yaml) with all checks.

    Args:
        cls: The section's dataclass.
        tree: Its keys and values.
        where: File name for error messages.
    """
    return _build(cls, dict(tree), where, "")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; duplicate keys are an error."""
    return _read_yaml(path.read_text(encoding="utf-8"), path.name)


class _Dumper(yaml.SafeDumper):
    """YAML writer whose floats are always read back as floats (1e-08 would be read as a string)."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", _plain_number(value))


_Dumper.add_representer(float, _represent_float)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; PyYAML keeps the last one silently."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in mapping:
            raise ValueError(f"line {key_node.start_mark.line + 1}: key '{key}' is given twice")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _read_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        # _UniqueKeyLoader is a SafeLoader: it builds plain containers and scalars only.
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{name}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


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
            raise ValueError(f"override '{item}': {_unknown(name, node)}")
        node = child
    if last not in node:
        raise ValueError(f"override '{item}': {_unknown(last, node)}")
    if _field_is_text(parents, last) and text not in ("null", "~"):
        node[last] = text
        return
    try:
        node[last] = yaml.load(text, Loader=_UniqueKeyLoader) if text else None
    except yaml.YAMLError:
        raise ValueError(f"override '{item}': '{text}' is not a YAML value") from None


def _field_is_text(parents: list[str], name: str) -> bool:
    """Tell whether a key takes text, so that paths such as 2024-01-01 or 007 stay text."""
    cls: Any = RunConfig
    for part in [*parents, name]:
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        cls = hints.get(part)
    return cls is str or cls == str | None


def _unknown(name: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(allowed)}"
    return f"{name}: unknown key ({hint})"


def _build(cls: type, tree: Any, where: str, prefix: str) -> Any:
    """Build a dataclass from a mapping; every key present, none unknown, every type exact."""
    if not isinstance(tree, dict):
        raise ValueError(
            f"{where}: {prefix.rstrip('.') or 'file'}: expected a mapping, got {_show(tree)}"
        )
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ValueError(f"{where}: {prefix}{_unknown(str(key), hints)}")
    missing = [key for key in hints if key not in tree]
    if missing:
        raise ValueError(
            f"{where}: missing {', '.join(prefix + m for m in missing)}; "
            f"a configuration is complete: copy the value from a preset in {PRESETS_DIR.name}/"
        )
    values = {}
    for key, hint in hints.items():
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(hint):
            values[key] = _build(typing.cast(type, hint), tree[key], where, f"{name}.")
        else:
            values[key] = _convert(tree[key], hint, f"{where}: {name}")
    return cls(**values)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Check one value against its annotation; exact types, except that 3 is a valid float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            raise ValueError(f"{name}: got {_show(value)}, allowed: {', '.join(map(str, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), name)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise ValueError(f"{name}: expected a list of {len(args)} values, got {_show(value)}")
        return tuple(
            _convert(v, a, f"{name}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
        )
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        hint_text = ""
        if hint in (int, float) and isinstance(value, str):
            try:
                number = float(value)
                hint_text = f"; YAML reads '{value}' as text, write {_plain_number(number)}"
            except ValueError:
                pass
        raise ValueError(f"{name}: expected {hint.__name__}, got {_show(value)}{hint_text}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def _plain_number(number: float) -> str:
    text = repr(number)
    return text if "." in text or "e" not in text else text.replace("e", ".0e")


def _show(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _check(config: RunConfig, where: str) -> None:
    """Check values against their ranges and against each other."""
    m, d, o, p, e = config.model, config.data, config.objective, config.optim, config.engine
    hidden, betas, warmup = o.replace_prob, list(p.betas), p.warmup_steps
    micro, clipping = e.train_micro_batch_size_per_gpu, e.gradient_clipping
    rules: list[tuple[bool, str]] = [
        (0 < o.mask_prob <= 1, f"objective.mask_prob: got {o.mask_prob}, allowed: 0 < p <= 1"),
        (0 <= hidden <= 1, f"objective.replace_prob: got {hidden}, allowed: 0 to 1"),
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
            p.schedule != "cosine" or p.decay_steps > warmup,
            f"optim.decay_steps: got {p.decay_steps}, must exceed optim.warmup_steps {warmup}",
        ),
        (clipping >= 0, f"engine.gradient_clipping: got {clipping}, must be >= 0"),
        (
            micro == 0 or e.train_batch_size % micro == 0,
            f"engine.train_batch_size: got {e.train_batch_size}, must be a multiple of "
            f"engine.train_micro_batch_size_per_gpu {micro}",
        ),
        (d.target_sum > 0, f"data.target_sum: got {d.target_sum}, must be > 0"),
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
    for name in ("large_encoder", "mini_encoder", "decoder"):
        stack = getattr(m, name)
        sizes = {k: getattr(stack, k) for k in ("depth", "heads", "dim_head", "ff_mult")}
        sizes["nb_features"] = stack.features()
        rules += [(v >= 1, f"model.{name}.{k}: got {v}, must be >= 1") for k, v in sizes.items()]
    for ok, message in rules:
        if not ok:
            raise ValueError(f"{where}: {message}")
