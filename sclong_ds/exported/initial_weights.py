"""Start a run from the weights of an exported or imported model (`run.init_from`).

Reads MODEL_DIR/model.safetensors one tensor at a time, after the folder was compared with its
manifest on rank 0; the model section of the run must be that of
the model, so that weights mean the same in both.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sclong_ds.config.sections import ModelConfig
from sclong_ds.config.strict_yaml import flat, override, to_dict
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.exported.manifest import WEIGHTS
from sclong_ds.exported.model_dir import check_finite, read_description
from sclong_ds.files.atomic import file_sha256

_FILES = ("model.gene_graph", "model.random_features_file")
"""Keys that name files, whose content must be the same."""
_FREE = ("feature_redraw_interval", "gene_vectors", "head_init")
"""Keys of the model section that may differ: they concern training, or were used up at its
start."""


class InitialWeights:
    """The weights of a model folder, read one at a time.

    Args:
        folder: MODEL_DIR of `export` or `import-reference`.

    Raises:
        ValueError: Damaged weights.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / WEIGHTS
        try:
            self._file = safe_open(self._path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self._path}: damaged ({error}); export the model again") from None

    def __call__(self, name: str) -> Tensor:
        """Return one weight, float32, on the CPU.

        Raises:
            ValueError: It is not finite.
        """
        weight = self._file.get_tensor(name)
        check_finite(f"{name} of {self._path}", weight)
        return weight


def check_initial_model(
    folder: Path, model: ModelConfig, genes: GeneVocabulary, *, target_sum: float
) -> None:
    """Check that the model of `run.init_from` is the run's: genes, transform, architecture, files.

    Args:
        folder: MODEL_DIR of `run.init_from`.
        model: The run's section model.
        genes: Genes of the corpus.
        target_sum: The run's `data.target_sum`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: What differs.
    """
    saved = read_description(folder)
    if saved["genes_hash"] != genes.hash:
        raise ValueError(
            f"run.init_from={folder}: its genes are not those of data.corpus; convert the corpus "
            f"with --genes {folder / 'genes.tsv'}"
        )
    theirs, ours = flat(saved["model"], "model"), flat(to_dict(model), "model")
    theirs["data.target_sum"] = saved["transform"]["target_sum"]
    ours["data.target_sum"] = target_sum
    free = {f"model.{key}" for key in _FREE}
    if theirs["model.random_features_file"]:
        free.add("model.projection_seed")
    lines = []
    for key in [key for key in theirs if key not in free]:
        want, have = theirs[key], ours.get(key)
        if key in _FILES and want is not None:
            want = str(folder / want)
            same = have is not None and file_sha256(have) == file_sha256(want)
        else:
            same = want == have
        if not same:
            lines.append(override(key, want))
    if lines:
        raise ValueError(f"run.init_from={folder}: its model is another one; set {' '.join(lines)}")
