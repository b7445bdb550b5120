"""The head of a fine-tuned model: what it predicts of a cell, how sure, and whether it knows it.

    MODEL_DIR/head.json          label, classes, layers, temperature, rule for unknown cells
    MODEL_DIR/head.safetensors   weights, and the statistics of the training cells

A head reads weighted means of the genes' vectors (`sclong_ds.model.pooling`), centred and scaled,
and ends in K scores of classes, or one number. Probabilities are the softmax of the scores divided
by a temperature. A cell is unknown if its highest probability is below a threshold, or if its
distance from the nearest class (Mahalanobis, one covariance) is above one; `sclong_ds.finetune`
chooses which.

Shapes: B cells, P parts, C base width, F = P * C features, K classes, or 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sclong_ds.exported.manifest import CURE
from sclong_ds.files.sealed_json import read_object
from sclong_ds.files.versions import refuse_later
from sclong_ds.model.pooling import Part, stored_parts

HEAD, HEAD_WEIGHTS = "head.json", "head.safetensors"
_FORMAT, _VERSION = "sclong_ds-head", 1
_DAMAGE = (KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """What a head is, without its weights."""

    parts: tuple[Part, ...]
    """Weighted means that it reads."""
    base_dim: int
    """C."""
    n_outputs: int
    """K, or 1 for a number."""
    hidden: int = 0
    """Width of the hidden layer; 0: the head is linear."""
    dropout: float = 0.0
    """Share of the hidden layer that training leaves out."""

    @property
    def n_features(self) -> int:
        """F."""
        return len(self.parts) * self.base_dim


class Head(nn.Module):
    """From features (B, F) to outputs (B, K).

    Args:
        shape: Its sizes.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("centre", torch.zeros(shape.n_features))
        self.register_buffer("scale", torch.ones(shape.n_features))
        layers: list[nn.Module] = []
        width = shape.n_features
        if shape.hidden:
            layers = [nn.Linear(width, shape.hidden), nn.GELU(), nn.Dropout(shape.dropout)]
            width = shape.hidden
        last = nn.Linear(width, shape.n_outputs)
        # From no opinion: early stopping then keeps weights small along what few cells tell.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def fit_scale(self, features: Tensor) -> None:
        """Centre and scale by training cells (n, F); a feature without variance stays 0."""
        found = features.double()
        spread = found.std(dim=0)
        self.centre.copy_(found.mean(dim=0))
        self.scale.copy_(torch.where(spread > 0, 1 / spread.clamp(min=1e-12), 0.0))

    def size(self) -> Tensor:
        """Return the sum of the squared weights, for a penalty."""
        squares = [p.float().square().sum() for p in self.layers.parameters() if p.ndim > 1]
        return torch.stack(squares).sum()

    def scaled(self, features: Tensor) -> Tensor:
        """Return features (B, F) centred and scaled."""
        return (features.to(self.centre.dtype) - self.centre) * self.scale

    def forward(self, features: Tensor) -> Tensor:
        """Return the outputs (B, K) of features (B, F)."""
        found: Tensor = self.layers(self.scaled(features))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """How outputs become predictions, chosen on held-out groups."""

    temperature: float = 1.0
    """Scores are divided by it."""
    unknown_by: Literal["confidence", "distance", "none"] = "none"
    """What calls a cell unknown."""
    threshold: float = 0.0
    """Lowest confidence, or largest distance, of a known cell."""
    error: float = 0.0
    """Of a number: 90% of the held-out cells are within it of their prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Where training cells lie in feature space, for the distance of a cell from them."""

    centroids: NDArray[np.float32]
    """(K, F) mean scaled features of each class, or (1, F)."""
    precision: NDArray[np.float32]
    """(F, F) inverse of their covariance within classes."""

    def distance(self, scaled: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return (B,) the distance of scaled features (B, F) from the nearest class."""
        nearest = np.full(len(scaled), np.inf)
        for centroid in self.centroids[np.isfinite(self.centroids).all(axis=1)]:
            away = (scaled - centroid).astype(np.float64)
            squared = np.einsum("bf,fg,bg->b", away, self.precision.astype(np.float64), away)
            nearest = np.minimum(nearest, np.sqrt(np.maximum(squared, 0.0) / away.shape[1]))
        return nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedHead:
    """A head with all that predicting needs."""

    head: Head
    label: str
    """Column that it learnt."""
    classes: tuple[str, ...]
    """Names of the K classes; empty for a number."""
    offset: float = 0.0
    """Of a number: mean of the training cells."""
    spread: float = 1.0
    """Of a number: standard deviation of the training cells."""
    judgement: Judgement = field(default_factory=Judgement)
    reference: Reference
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was made; plain JSON."""

    def columns(self, features: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Return the columns of obs that predict cells from their features (n, F)."""
        with torch.inference_mode():
            given = torch.from_numpy(np.asarray(features, dtype=np.float32))
            outputs, scaled = self.head(given).numpy(), self.head.scaled(given).numpy()
        return prediction_columns(
            self.label, self.classes, outputs=outputs * self.spread + self.offset,
            distance=self.reference.distance(scaled), judgement=self.judgement,
        )  # fmt: skip


def prediction_columns(
    label: str,
    classes: tuple[str, ...],
    *,
    outputs: NDArray[np.floating],
    distance: NDArray[np.float64],
    judgement: Judgement,
) -> dict[str, NDArray[Any]]:
    """Return columns of obs for outputs (n, K): prediction, how sure, whether unknown.

    Args:
        label: Column that was learnt.
        classes: Names of the classes; empty for a number.
        outputs: Scores, or numbers (n, 1).
        distance: (n,) from the training cells.
        judgement: How outputs become predictions.
    """
    name = f"predicted_{label}"
    if not classes:
        unknown = is_unknown(np.ones(len(distance)), distance, judgement)
        columns = {name: outputs[:, 0].astype(np.float64)}
        columns |= {f"{name}_error": np.full(len(outputs), judgement.error)}
        return columns | {f"{name}_unknown": unknown}
    shares = probabilities(outputs, judgement.temperature)
    best = shares.max(axis=1)
    return {
        name: np.array(classes, dtype=object)[shares.argmax(axis=1)],
        f"{name}_probability": best,
        f"{name}_unknown": is_unknown(best, distance, judgement),
    }


def probabilities(outputs: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Return the softmax (n, K) of scores (n, K) divided by a temperature."""
    scores = np.asarray(outputs, dtype=np.float64) / temperature
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def is_unknown(
    confidence: NDArray[np.float64], distance: NDArray[np.float64], judgement: Judgement
) -> NDArray[np.bool_]:
    """Return (n,) which cells are called unknown.

    Args:
        confidence: (n,) highest probability.
        distance: (n,) from the training cells.
        judgement: What calls them so.
    """
    if judgement.unknown_by == "none":
        return np.zeros(len(distance), dtype=bool)
    if judgement.unknown_by == "confidence":
        return np.asarray(confidence < judgement.threshold)
    return np.asarray(distance > judgement.threshold)


def write_head(folder: Path, fitted: FittedHead) -> None:
    """Write the files of a head into a model folder that has no manifest yet."""
    shape = asdict(fitted.head.shape) | {"parts": [list(part) for part in fitted.head.shape.parts]}
    content = {"format": _FORMAT, "version": _VERSION, "label": fitted.label}
    content |= {"classes": list(fitted.classes), "offset": fitted.offset, "spread": fitted.spread}
    content |= {"shape": shape, "judgement": asdict(fitted.judgement), "made": dict(fitted.facts)}
    (folder / HEAD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    tensors = {k: v.detach().cpu().float() for k, v in fitted.head.state_dict().items()}
    reference = fitted.reference
    tensors["reference.centroids"] = torch.from_numpy(reference.centroids)
    tensors["reference.precision"] = torch.from_numpy(reference.precision)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / HEAD_WEIGHTS)


def read_head(folder: Path) -> FittedHead | None:
    """Return the head of a model folder; None: it has none.

    Args:
        folder: MODEL_DIR.

    Raises:
        FileNotFoundError: One of its two files is missing.
        LaterVersionError: A later version wrote it.
        ValueError: A damaged file.
    """
    path = folder / HEAD
    if not path.exists():
        return None
    content = read_object(path)
    if content.get("format") == _FORMAT:
        refuse_later(content.get("version"), newest=_VERSION, what=_FORMAT, where=path)
    try:
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"no {_FORMAT} of version {_VERSION}")
        parts = stored_parts(content["shape"]["parts"])
        head = Head(HeadShape(**(content["shape"] | {"parts": parts})))
        weights = load_file(folder / HEAD_WEIGHTS)
        centroids, precision = (
            weights.pop(f"reference.{name}").numpy() for name in ("centroids", "precision")
        )
        head.load_state_dict(weights)
        return FittedHead(
            head=head.eval(),
            label=str(content["label"]),
            classes=tuple(map(str, content["classes"])),
            offset=float(content["offset"]),
            spread=float(content["spread"]),
            judgement=Judgement(**content["judgement"]),
            reference=Reference(centroids=centroids, precision=precision),
            facts=dict(content["made"]),
        )
    except _DAMAGE as error:
        reason = " ".join(f"{error}".split())[:300]
        raise ValueError(f"{path}: damaged ({reason}); {CURE}") from None
