"""Distributed pretraining of scLong-style single-cell foundation models.

Public names, imported on first use so that `import sclong_ds` costs nothing:

- `load_config(PRESET_OR_FILE, overrides)`: a run's configuration.
- `train(config, callbacks)`: train in this process; returns the run folder. `Callback`: base class
  of what is called meanwhile; `TrainingRun`: what it is told of the run.
- `load_model(MODEL_DIR, device=...)`: an exported model as a torch module, a `ScLong`.
- `from_pretrained("hf://ORG/NAME")`: the same name for the same; `save_pretrained(model, DIR)` and
  `push_to_hub(model, "ORG/NAME")` write and publish it. All three are methods of `ScLong` too.
- `embed(model, cells)`: embeddings (n, W) of AnnData, a DataFrame or a file; `Reading`: how to read
  them.
- `align(cells, model)`: the cells as AnnData in the model's gene order.
- `predict(MODEL_DIR, cells)`: what a fine-tuned model says of cells, a DataFrame.
- `gene_vectors(model)`: the vectors (G, C) of a model's genes, before any cell is seen.
- `evaluate(model, cells, label=...)`: scores of these embeddings beside baselines.
- `Corpus(PATH)`: a finalized corpus; `GeneVocabulary`: its genes.
- `CellLoader(corpus, train_batch_size=...)`: batches of cells in training order for any training
  loop; `open_stream` makes other orders.
- `favor_attention(q, k, v, features)`: FAVOR+ attention, in Triton on GPUs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.favor_attention import favor_attention
    from sclong_ds.config.load import load_config
    from sclong_ds.corpus.corpus import Corpus
    from sclong_ds.corpus.genes import GeneVocabulary
    from sclong_ds.embedding.in_memory import Reading, align, embed, predict
    from sclong_ds.evaluation.in_memory import evaluate
    from sclong_ds.gene_analysis.genes import gene_vectors
    from sclong_ds.hub.hub import from_pretrained, load_model, push_to_hub, save_pretrained
    from sclong_ds.loader.loader import CellLoader, open_stream
    from sclong_ds.model.sclong import ScLong
    from sclong_ds.pretrain import train
    from sclong_ds.training.callbacks.callback import Callback, TrainingRun

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "CellLoader",
    "Corpus",
    "GeneVocabulary",
    "Reading",
    "ScLong",
    "TrainingRun",
    "align",
    "embed",
    "evaluate",
    "favor_attention",
    "from_pretrained",
    "gene_vectors",
    "load_config",
    "load_model",
    "open_stream",
    "predict",
    "push_to_hub",
    "save_pretrained",
    "train",
]
_HOMES = {
    "Callback": "sclong_ds.training.callbacks.callback",
    "CellLoader": "sclong_ds.loader.loader",
    "Corpus": "sclong_ds.corpus.corpus",
    "GeneVocabulary": "sclong_ds.corpus.genes",
    "Reading": "sclong_ds.embedding.in_memory",
    "ScLong": "sclong_ds.model.sclong",
    "TrainingRun": "sclong_ds.training.callbacks.callback",
    "align": "sclong_ds.embedding.in_memory",
    "embed": "sclong_ds.embedding.in_memory",
    "evaluate": "sclong_ds.evaluation.in_memory",
    "favor_attention": "kernels.favor_attention",
    "from_pretrained": "sclong_ds.hub.hub",
    "gene_vectors": "sclong_ds.gene_analysis.genes",
    "load_config": "sclong_ds.config.load",
    "load_model": "sclong_ds.hub.hub",
    "open_stream": "sclong_ds.loader.loader",
    "predict": "sclong_ds.embedding.in_memory",
    "push_to_hub": "sclong_ds.hub.hub",
    "save_pretrained": "sclong_ds.hub.hub",
    "train": "sclong_ds.pretrain",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sclong_ds' has no attribute '{name}'")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        from sclong_ds.command_line import missing_package

        line = missing_package(error)
        if line is None:
            raise
        raise ModuleNotFoundError(f"sclong_ds.{name}: {line}", name=error.name) from error


def __dir__() -> list[str]:
    """List the public names, imported or not, and what every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
