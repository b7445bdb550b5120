"""The exported model: a folder with weights, configuration, genes, graph and a model card.

No DeepSpeed needed.

    MODEL_DIR/model.safetensors             float32 weights
    MODEL_DIR/config.yaml                   architecture (`model` section), transform, version
    MODEL_DIR/genes.tsv                     gene order of the inputs
    MODEL_DIR/gene_graph.npz                the gene graph, when the architecture has one
    MODEL_DIR/random_features.safetensors   the random features of FAVOR+
    MODEL_DIR/training_cells.npz            digests of the cells it was trained on, where known
    MODEL_DIR/embedding.json, embedding.npz the recipe of its embeddings, where one was chosen
    MODEL_DIR/head.json, head.safetensors   what was fine-tuned on it (`sclong_ds.exported.head`)
    MODEL_DIR/provenance.json               what the model was made from
    MODEL_DIR/README.md                     model card, with the front matter of the hub
    MODEL_DIR/config.json                   what the hub knows the library by; never read here
    MODEL_DIR/manifest.json                 size and checksums of all of these

`python -m sclong_ds export` (`sclong_ds.checkpoint.save`) and `import-reference` write it,
`sclong_ds.load_model` reads it. Weights pass one at a time when written and are mapped from the
file when read, so that memory holds them once. Weights are finite, and every file is compared with
the manifest (`sclong_ds.exported.manifest`) before a model is made of it.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sclong_ds.config import history
from sclong_ds.config.sections import ModelConfig
from sclong_ds.config.strict_yaml import read_yaml, section_from_dict, to_dict
from sclong_ds.corpus.gene_graph import read_gene_graph
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.corpus.transform import Transform
from sclong_ds.exported.described.model_card import CONFIG, hub_config, model_card
from sclong_ds.exported.head import FittedHead, write_head
from sclong_ds.exported.manifest import (
    CARD,
    CURE,
    WEIGHTS,
    check_files,
    refuse_other_folder,
    write_manifest,
)
from sclong_ds.exported.recipe_file import ChosenRecipe, read_control, read_recipe, write_recipe
from sclong_ds.exported.training_cells import TrainingCells
from sclong_ds.files.atomic import partial_name, remove_partials_of, sync_tree
from sclong_ds.files.versions import refuse_later
from sclong_ds.model.features_file import ALIGNMENT, aligned, read_features, write_features
from sclong_ds.model.sclong import ScLong
from sclong_ds.progress import count_progress

FORMAT = "sclong_ds-model"
VERSION = 3
_UNCHECKED = 2
"""Version without a manifest; it is still read."""
GRAPH = "gene_graph.npz"
FEATURES = "random_features.safetensors"

_log = logging.getLogger(__name__)


def write_model_dir(
    out: Path,
    *,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    transform: Transform,
    genes: Path,
    graph: Path | None,
    features: Mapping[str, Tensor] | None,
    provenance: Mapping[str, Any],
    training_cells: TrainingCells | None = None,
    choose: Callable[[ScLong], ChosenRecipe | None] | None = None,
    head: FittedHead | None = None,
) -> None:
    """Write an exported model; the folder appears whole or not at all.

    Args:
        out: Folder to make; it must not exist.
        weights: State dict of `ScLong`; each is asked for once.
        model: Architecture.
        transform: From counts to model input.
        genes: genes.tsv of the training corpus.
        graph: The gene graph's npz, or None.
        features: The random features (M, K) by `stack.layer`, or None: they are drawn.
        provenance: What the model was trained or imported from.
        training_cells: What it was trained on; None: not known.
        choose: Gives the recipe of its embeddings; None: the mean over the expressed genes.
        head: What was fine-tuned on the model, or None.

    Raises:
        FileExistsError: `out` exists.
        ValueError: Weights, genes, graph or features that do not belong to the architecture.
    """
    check_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_partials_of(out)
    partial = partial_name(out)
    partial.mkdir()
    try:
        for source, name in ((genes, "genes.tsv"), (graph, GRAPH)):
            if source is not None:
                shutil.copyfile(source, partial / name)
        if features is not None:
            write_features(partial / FEATURES, features)
        if training_cells is not None:
            training_cells.write(partial)
        config = _description(model, transform, partial)
        shapes = {n: tuple(t.shape) for n, t in _empty_model(partial, config).state_dict().items()}
        _write_weights(partial / WEIGHTS, weights, shapes)
        chosen = None if choose is None else choose(_with_weights(partial, config))
        if head is not None:
            write_head(partial, head)
        n_parameters = sum(map(math.prod, shapes.values()))
        _write_texts(partial, config, provenance, n_parameters, chosen)
        write_manifest(partial)
        sync_tree(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_derived(
    out: Path,
    base: ScLong,
    source: Path,
    *,
    weights: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    training_cells: TrainingCells | None,
    choose: Callable[[ScLong], ChosenRecipe | None],
    head: FittedHead | None = None,
) -> None:
    """Write a model of the architecture, genes, graph and features of another, with other weights.

    Args:
        out: Folder to make; it must not exist.
        base: The other model, as `load_model` gives it.
        source: Its folder.
        weights: As for `write_model_dir`, like the rest.
        provenance: What the new model was made from.
        training_cells: What it was trained on; None: not known.
        choose: Gives the recipe of its embeddings.
        head: What was fine-tuned on the model, or None.

    Raises:
        FileExistsError: `out` exists.
        ValueError: Weights that do not belong to the architecture.
    """
    write_model_dir(
        out,
        weights=weights,
        model=base.config,
        transform=base.transform,
        genes=source / "genes.tsv",
        graph=source / GRAPH if (source / GRAPH).is_file() else None,
        features=read_features(source / FEATURES) if (source / FEATURES).is_file() else None,
        provenance=provenance,
        training_cells=training_cells,
        choose=choose,
        head=head,
    )


def _write_texts(
    folder: Path,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    n_parameters: int,
    chosen: ChosenRecipe | None,
) -> None:
    if chosen is not None:
        write_recipe(folder, chosen)
    card = model_card(config, provenance, n_parameters=n_parameters, chosen=chosen)
    texts = {
        "config.yaml": yaml.safe_dump(dict(config), sort_keys=False),
        "provenance.json": json.dumps(dict(provenance), indent=2) + "\n",
        CONFIG: hub_config(config),
        CARD: card,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def check_absent(out: Path) -> None:
    """Refuse a folder to write that is there already.

    Raises:
        FileExistsError: It exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: name another folder or remove it first")


def _description(model: ModelConfig, transform: Transform, folder: Path) -> dict[str, Any]:
    """Return the content of config.yaml for a folder that holds genes, graph and features."""
    genes = GeneVocabulary.read(folder / "genes.tsv")
    files = {
        "gene_graph": GRAPH if (folder / GRAPH).is_file() else None,
        "gene_vectors": None,
        "random_features_file": FEATURES if (folder / FEATURES).is_file() else None,
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "config_version": history.VERSION,
        "n_genes": len(genes),
        "genes_hash": genes.hash,
        "transform": asdict(transform),
        "model": to_dict(model) | files,
    }


def _write_weights(
    path: Path, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Write a safetensors file tensor by tensor; the library's writer needs all of them at once.

    What fits between multiples of ALIGNMENT comes first, so that it lies at such when it is mapped.
    Source of the layout: https://huggingface.co/docs/safetensors, "Format".
    """
    if set(weights) != set(shapes):
        name = min(set(weights) ^ set(shapes))
        problem = "is missing" if name in shapes else "is unknown to the model"
        raise ValueError(f"the weights do not fit the architecture: {name} {problem}")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = dict(sorted(shapes.items(), key=lambda one: 4 * math.prod(one[1]) % ALIGNMENT > 0))
    for name, shape in ordered.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in _with_progress(ordered):
            tensor = weights[name].detach()
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"weight {name} has the shape {tuple(tensor.shape)}, must be {shapes[name]}"
                )
            values = tensor.to("cpu", torch.float32).reshape(-1)
            check_finite(name, values)
            file.write(values.numpy().astype("<f4", copy=False).data)


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight that is NaN or infinite somewhere: the model would give nothing else.

    Args:
        name: Its name, for the message.
        weight: The weight.

    Raises:
        ValueError: It is not finite.
    """
    # Two numbers, NaN if any is: no mask of the weight's size.
    if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
        raise ValueError(f"weight {name} holds NaN or inf: no model can be made of it")


def _with_progress(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield the names, and show how many bytes of weights were written."""
    with count_progress("weights", 4 * sum(map(math.prod, shapes.values())), "B") as on_bytes:
        for name, shape in shapes.items():
            yield name
            on_bytes(4 * math.prod(shape))


def _empty_model(folder: Path, config: Mapping[str, Any]) -> ScLong:
    """Return the model of a folder that holds genes, graph and features, without weights."""
    where = f"{folder}/config.yaml"
    genes = GeneVocabulary.read(folder / "genes.tsv")
    if genes.hash != config["genes_hash"]:
        raise ValueError(
            f"{folder}/genes.tsv was changed: its hash is not the one in config.yaml; export again"
        )
    architecture = section_from_dict(ModelConfig, config["model"], where)
    graph = features = None
    if architecture.gene_graph is not None:
        graph = read_gene_graph(folder / architecture.gene_graph, genes_hash=genes.hash)
    if architecture.random_features_file is not None:
        features = read_features(folder / architecture.random_features_file)
    with torch.device("meta"):
        model = ScLong(architecture, n_genes=len(genes), graph=graph, features=features)
    model.genes = genes
    model.transform = section_from_dict(Transform, config["transform"], where)
    return model


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's config.yaml; all files are compared first.

    Args:
        folder: MODEL_DIR.

    Returns:
        The content, with the keys that came after the version that wrote it.

    Raises:
        FileNotFoundError: A file of the folder is missing.
        LaterVersionError: A later version wrote it.
        ValueError: A damaged file, or a version before 2.
    """
    refuse_other_folder(folder)
    checked = check_files(folder)
    config, where = read_yaml(folder / "config.yaml"), f"{folder}/config.yaml"
    if config.get("format") == FORMAT:
        refuse_later(config.get("version"), newest=VERSION, what=FORMAT, where=where)
    if config.get("format") != FORMAT or config.get("version") not in (VERSION, _UNCHECKED):
        raise ValueError(
            f"{where}: format {config.get('format')} version {config.get('version')}; "
            f"this version reads {FORMAT} {VERSION} and {_UNCHECKED}"
        )
    if not checked and config["version"] == VERSION:
        raise FileNotFoundError(f"{folder}/manifest.json: missing; {CURE}")
    history.check_version(config.get("config_version", 1), where=where)
    return history.complete(config)


def load_model(model_dir: str | Path, *, device: str | torch.device = "cpu") -> ScLong:
    """Load an exported model in evaluation mode.

    On the CPU its weights are mapped from the file: keep the file while the model is in use. Those
    of folders of earlier versions are copied to memory; export again to map them.

    Args:
        model_dir: Folder written by `python -m sclong_ds export` or `import-reference`.
        device: Where the model goes.

    Returns:
        The model, float32, with `genes` (GeneVocabulary) and `transform` (Transform) set.

    Raises:
        FileNotFoundError: Not there, or a file is missing.
        ValueError: A damaged file, another format version, files that do not belong together, or a
            device that is not there.
    """
    place, folder = checked_device(device), Path(model_dir)
    model = _with_weights(folder, read_description(folder))
    sizes = {"base_dim": model.config.base_dim, "n_genes": model.n_genes}
    model.recipe, model.control = read_recipe(folder, **sizes), read_control(folder, **sizes)
    model.folder = folder
    return model.to(place).eval()


def checked_device(device: str | torch.device) -> torch.device:
    """Return a device of torch that a call from Python names.

    Raises:
        ValueError: There is none of that name, or no such GPU here.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device={device!r}: no device of torch; use device='cpu' or device='cuda'"
        ) from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        there = (
            f"{torch.cuda.device_count()} CUDA GPUs" if torch.cuda.is_available() else "no CUDA GPU"
        )
        raise ValueError(f"device={str(found)!r}: torch sees {there} here; use device='cpu'")
    return found


def _with_weights(folder: Path, config: Mapping[str, Any]) -> ScLong:
    """Return the model of a folder, on the CPU in evaluation mode, its weights mapped."""
    model = _empty_model(folder, config)
    try:
        weights = load_file(folder / WEIGHTS)
        for name, weight in weights.items():
            if weight.dtype != torch.float32:
                raise ValueError(f"{folder / WEIGHTS}: {name} is {weight.dtype}, not float32")
            check_finite(f"{name} of {folder / WEIGHTS}", weight)
            weights[name] = aligned(weight)
        # Assigned, not copied: a second set of weights would double the memory.
        model.load_state_dict(weights, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder / WEIGHTS} does not fit its config.yaml: {reason}") from None
    return model.eval()
