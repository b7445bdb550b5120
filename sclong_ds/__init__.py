"""Distributed pretraining of scLong-style single-cell foundation models.

Public names, imported on first use so that `import sclong_ds` costs nothing:

- `load_model(MODEL_DIR, device=...)`: an exported model as a torch module.
- `ScLong`: the model class.
- `Corpus(PATH)`: a finalized corpus.
- `load_config(PRESET_OR_FILE, overrides)`: a run's configuration.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Corpus", "ScLong", "load_config", "load_model"]
_HOMES = {
    "Corpus": "sclong_ds.corpus.corpus",
    "ScLong": "sclong_ds.model.sclong",
    "load_config": "sclong_ds.config.load",
    "load_model": "sclong_ds.exported.model_dir",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sclong_ds' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
