"""An exported model as an MLflow model, beside the run it comes from.

    python -m sclong_ds log-model MODEL_DIR [--run RUN_DIR_OR_RUN_ID] [--register NAME]

    model = mlflow.pyfunc.load_model("models:/NAME/1", model_config={"batch_size": 32})
    embeddings = model.predict(cells)  # AnnData, or a DataFrame of cells by genes: raw counts

The MLflow model holds the folder that `python -m sclong_ds export` wrote and the code that reads
it, so that the environment it names is enough to open it. Cells are embedded as by
`python -m sclong_ds embed`, under the same rules: raw counts, genes by Ensembl id or symbol.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclong_ds.command_line import local_path
from sclong_ds.files.atomic import read_file
from sclong_ds.files.places import is_installed
from sclong_ds.run_folder.credentials import without_credentials
from sclong_ds.run_folder.files import recorded_ids
from sclong_ds.tracking.client import find_run_dir, new_client, one_line, with_credentials

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

    from sclong_ds.model.sclong import ScLong

log = logging.getLogger(__name__)

ARTIFACT = "model"
"""Name of the model in its run."""
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "device": "auto",
    "min_genes_mapped": None,
    "min_share_mapped": None,
    "counts": None,
    "gene_column": None,
    "id_type": None,
    "gene_list": None,
    "genome": None,
}
"""What `mlflow.pyfunc.load_model(..., model_config=...)` may set; null: as `embed` does."""
# What the code of the three packages imports to embed cells.
_REQUIREMENTS = (
    "torch", "torch-geometric", "numpy", "scipy", "pandas", "anndata", "h5py", "zarr", "numcodecs",
    "google-crc32c", "numba", "safetensors", "pyyaml", "tqdm", "goatools",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m sclong_ds log-model`."""
    parser.add_argument("model_dir", type=local_path, metavar="MODEL_DIR", help="exported model")
    parser.add_argument(
        "--run",
        metavar="RUN_DIR_OR_RUN_ID",
        help="run it belongs to (default: the one that MODEL_DIR was exported from)",
    )
    parser.add_argument("--register", metavar="NAME", help="make it a version of a model registry")


def run(args: argparse.Namespace) -> int:
    """Log the model, print how to open it, and return the exit status."""
    uri = log_model(args.model_dir, run=args.run, register=args.register)
    sys.stdout.write(f"{uri}\n")
    return 0


def log_model(model_dir: Path, *, run: str | None = None, register: str | None = None) -> str:
    """Attach an exported model to its MLflow run.

    Args:
        model_dir: Folder that `export` wrote.
        run: Run folder or run id; None: the run that the folder was exported from.
        register: Name in the model registry; None: it is not registered.

    Returns:
        URI for `mlflow.pyfunc.load_model`.

    Raises:
        FileNotFoundError: No such model or run.
        ValueError: The run has no MLflow run, or the tracking server refuses.
    """
    # Only a folder that can be read is worth logging.
    from sclong_ds.exported.model_dir import read_description

    read_description(model_dir)
    provenance = json.loads(read_file(model_dir / "provenance.json"))
    ids = _run_of(model_dir, provenance, run)
    uri = with_credentials(ids["mlflow_tracking_uri"])
    client = new_client(uri, patient=True)
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        experiment = client.get_run(ids["mlflow_run_id"]).info.experiment_id
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment_id=experiment)
        logged = Model.log(
            artifact_path=None,
            name=ARTIFACT,
            flavor=mlflow.pyfunc,
            run_id=ids["mlflow_run_id"],
            registered_model_name=register,
            step=int(provenance.get("step", 0)),
            loader_module="sclong_ds.embedding.mlflow_model",
            data_path=str(model_dir),
            code_paths=_code_paths(),
            pip_requirements=_requirements(),
            model_config=SETTINGS,
        )
    except (MlflowException, OSError) as error:
        shown = without_credentials(uri)
        raise ValueError(f"MLflow at {shown}: {one_line(error)}") from None
    version = logged.registered_model_version
    return f"models:/{register}/{version}" if register else logged.model_uri


def _code_paths() -> list[str]:
    """Return the folders of this code, which MLflow keeps beside the model."""
    root = Path(__file__).resolve().parents[2]
    names = ("sclong_ds",) if is_installed() else ("sclong_ds", "kernels", "data_prep")
    return [str(root / name) for name in names]


def _run_of(model_dir: Path, provenance: Mapping[str, Any], run: str | None) -> dict[str, str]:
    """Return the ids of the run that a model belongs to."""
    if run is None:
        ids, source = dict(provenance.get("run") or {}), f"{model_dir}/provenance.json"
    else:
        folder = Path(run) if Path(run).is_dir() else find_run_dir(run, patient=True)
        ids, source = recorded_ids(folder), str(folder)
    if "mlflow_run_id" not in ids:
        raise ValueError(
            f"{source} names no MLflow run: give --run RUN_DIR of a run that was tracked "
            f"(tracking.enabled=true)"
        )
    return ids


def _requirements() -> list[str]:
    """Return the installed versions; of a build for one kind of device (2.13.0+cpu) the release."""
    versions = {name: importlib.metadata.version(name) for name in _REQUIREMENTS}
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions.items()]


def _load_pyfunc(data_path: str, model_config: Mapping[str, Any] | None = None) -> EmbeddingModel:
    """Open the model; MLflow calls it by this name."""
    settings = SETTINGS | dict(model_config or {})
    unknown = settings.keys() - SETTINGS.keys()
    if unknown:
        raise ValueError(
            f"model_config: unknown {', '.join(sorted(unknown))}; allowed: {', '.join(SETTINGS)}"
        )
    from sclong_ds.embedding.opening import choose_device
    from sclong_ds.exported.model_dir import load_model

    model = load_model(data_path, device=choose_device(settings["device"]))
    return EmbeddingModel(model, settings)


class EmbeddingModel:
    """Embeds cells.

    Args:
        model: From `load_model`.
        settings: As `SETTINGS`.
    """

    def __init__(self, model: ScLong, settings: Mapping[str, Any]) -> None:
        self._model, self._settings = model, settings

    def predict(
        self, cells: AnnData | DataFrame, params: Mapping[str, Any] | None = None
    ) -> DataFrame:
        """Return the embeddings, a row per cell with the cell's name.

        Args:
            cells: Raw counts of n cells: AnnData, or a DataFrame with genes as columns.
            params: Ignored; MLflow passes it.

        Returns:
            (n, W) float32, W as `sclong_ds.embed`; zero for a cell without counts of the model's
            genes.

        Raises:
            ValueError: Not counts of known human genes.
        """
        from pandas import DataFrame

        from sclong_ds.embedding.in_memory import embed

        given = {
            name: value
            for name, value in self._settings.items()
            if name not in ("batch_size", "device") and value is not None
        }
        if "gene_list" in given:
            given["gene_list"] = Path(given["gene_list"])
        size = self._settings["batch_size"]
        found = embed(self._model, cells, batch_size=size, **given)
        names = cells.index.astype(str) if isinstance(cells, DataFrame) else cells.obs_names
        return DataFrame(found, index=names)
