"""What a training checks of its command before the imports that take long.

Nothing here needs numpy or torch: a start is seen and can be stopped from its first moment on, and
a wrong command is told at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sclong_ds.config.sections import RunConfig
from sclong_ds.run_folder.credentials import without_credentials

_OF_A_RANK = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCH = (
    "start training with slurm/pretrain.sh, the deepspeed launcher or torchrun, or set RANK, "
    "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process"
)


def check_launch() -> None:
    """Check what a launcher told this process of the ranks.

    Raises:
        ValueError: Several tasks were started without a word about their ranks, and each would
            train alone in the same run folder; or some of what a rank needs is missing or no
            number.
    """
    if "RANK" not in os.environ:
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if os.environ.get(name, "") not in ("", "1"):
                raise ValueError(
                    f"{name}={os.environ[name]}, but RANK is not set: each task would train alone "
                    f"in the same run.dir; {_LAUNCH}"
                )
        return
    missing = [name for name in ("RANK", *_OF_A_RANK) if not os.environ.get(name)]
    if missing:
        raise ValueError(f"RANK is set, but {' and '.join(missing)} not; {_LAUNCH}")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise ValueError(f"{name}: got '{os.environ[name]}', must be a whole number; {_LAUNCH}")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise ValueError(
            f"RANK: got {os.environ['RANK']}, must be below WORLD_SIZE={os.environ['WORLD_SIZE']}; "
            f"{_LAUNCH}"
        )


def check_call(config: object, callbacks: object) -> None:
    """Check what `sclong_ds.train` is given, and by what launcher.

    Raises:
        TypeError: No configuration, or no list of callbacks.
        ValueError: As for `check_launch`.
    """
    if not isinstance(config, RunConfig):
        raise TypeError(
            f"config: got {type(config).__name__}; give what sclong_ds.load_config(PRESET_OR_FILE, "
            "overrides) returns"
        )
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        raise TypeError(
            f"callbacks: got {type(callbacks).__name__}; give a list of sclong_ds.Callback"
        )
    check_launch()


def check_run_dir(given: str | None) -> Path | None:
    """Return the run folder, to which the heartbeat of a start goes; None: it is not set.

    Args:
        given: The value of `run.dir`.

    Raises:
        ValueError: It is a URL, or a name from which no checkpoint could be loaded.
        PermissionError: It cannot be made or written.
    """
    if given is None:
        return None
    if "://" in given:
        raise ValueError(f"run.dir={given}: must be a path, on a shared file system where "
                         f"several nodes train, not a URL")  # fmt: skip
    if set(given) & set("*?["):
        raise ValueError(
            f"run.dir={given}: holds one of * ? [ in its name, which DeepSpeed takes for a pattern "
            f"when it loads a checkpoint: the run could not be resumed; name the folder without"
        )
    run_dir = Path(given)
    place = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise PermissionError(f"run.dir={run_dir}: {place} is not a folder that can be written")
    return run_dir


def check_inputs(config: RunConfig) -> None:
    """Check what else the command line must name.

    Raises:
        ValueError: A required setting is missing.
        FileNotFoundError: A named file or folder does not exist.
    """
    required = {
        "data.corpus": (config.data.corpus, "the folder that `python -m data_prep finalize` made"),
        "run.dir": (config.run.dir, "the run folder to make or to resume"),
    }
    if config.model.gene_encoder == "graph":
        made = (
            "the file that `python -m data_prep gene-graph` made (or model.gene_encoder=embedding)"
        )
        required["model.gene_graph"] = (config.model.gene_graph, made)
    for key, (value, meaning) in required.items():
        if value is None:
            raise ValueError(f"{key} is not set: add {key}=PATH, {meaning}")
    if without_credentials(config.tracking.uri or "") != (config.tracking.uri or ""):
        raise ValueError(
            "tracking.uri holds a user or password, which config.yaml and MLflow would show: give "
            "the address alone, and the rest as MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or all of it as MLFLOW_TRACKING_URI"
        )
    for key, path in {
        "model.gene_graph": config.model.gene_graph,
        "model.gene_vectors": config.model.gene_vectors,
        "model.random_features_file": config.model.random_features_file,
    }.items():
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"{key}={path}: no such file")
    corpus = str(config.data.corpus)
    if "://" not in corpus and not Path(corpus).is_dir():
        raise FileNotFoundError(f"data.corpus={corpus}: no such folder")
    if config.data.dataset_weights is not None:
        # Imported late: few runs have such a file, and numpy and zarr come with it.
        from sclong_ds.loader.weights import read_weights

        read_weights(Path(config.data.dataset_weights))
