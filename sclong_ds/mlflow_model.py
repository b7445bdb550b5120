"""Name under which MLflow models of earlier versions load `sclong_ds.embedding.mlflow_model`."""

from sclong_ds.embedding.mlflow_model import _load_pyfunc as _load_pyfunc
