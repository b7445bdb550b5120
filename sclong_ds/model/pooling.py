"""From the vectors of a cell's genes to one vector of the cell: the recipe of an embedding.

A recipe is one or several parts, concatenated. A part is a weighted mean over genes of

- `decoder`: the contextual representations behind the decoder (`ScLong.encode`),
- `encoders`: those in front of it, behind the large and the mini encoder,
- `gene_vectors`: the model's gene vectors, without any context,

or, with `model.cell_vector`, the `cell_vector` itself, or `cell_values`: all values, those of
unexpressed and unmeasured genes as 0, summed with the cell vector's vectors of the genes. The
cell's vector leaves out what is not expressed, since a hidden value must not be told from a zero;
but which genes are not expressed tells tissues apart. The weights of both are their own (named
`expressed`). Elsewhere the weight of a gene in the cell is

- `expressed`: 1 if it has a count,
- `value`, `value^3`: a power of its value: of high genes, each part is more of the mean,
- `top_N`: 1 for the N expressed genes of highest value (ties: the lower gene index).

A mean over all expressed genes is drowned by what all cells express; the highest genes tell cells
apart. Parts are then centred and scaled to variance 1 in all (`scaled`), or along each of their
principal directions (`whitened`), by statistics of training cells, or left as they are (`none`).

Shapes: B cells, G genes, C base width, W width of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Layer = Literal["decoder", "encoders", "gene_vectors", "cell_vector", "cell_values"]
LAYERS: tuple[Layer, ...] = ("decoder", "encoders", "gene_vectors", "cell_vector", "cell_values")
OF_CELLS: tuple[Layer, ...] = ("cell_vector", "cell_values")
"""Those that are a vector of the cell already, of models with `model.cell_vector`."""
_TOP = "top_"
_POWERS = {"expressed": 0, "value": 1, "value^3": 3}


class Part(NamedTuple):
    """One weighted mean."""

    layer: Layer
    weights: str

    def text(self) -> str:
        """Return the part in words."""
        if self.layer == "cell_vector":
            return "the cell's vector"
        if self.layer == "cell_values":
            return "all values, zeros too, along the cell's vector"
        what = {"decoder": "", "encoders": " behind the encoders", "gene_vectors": " (no context)"}
        genes = {"expressed": "the expressed genes", "value": "genes, weighted by value"}
        genes["value^3"] = "genes, weighted by the cube of the value"
        which = genes.get(self.weights) or f"the {self.weights.removeprefix(_TOP)} highest genes"
        return f"mean over {which}{what[self.layer]}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an embedding is made of representations."""

    parts: tuple[Part, ...]
    scaling: str = "none"
    """none, scaled or whitened, with the ridge."""
    centres: Tensor | None = None
    """(parts, C) what is subtracted; None with `none`."""
    maps: Tensor | None = None
    """(parts, C, C) what a centred row is then multiplied with; None with `none`."""

    def text(self) -> str:
        """Return the recipe in words."""
        parts = "; ".join(part.text() for part in self.parts)
        return parts if self.scaling == "none" else f"{parts}; {self.scaling}"

    def width(self, base_dim: int) -> int:
        """Return the width W for a model of base width C."""
        return len(self.parts) * base_dim

    def apply(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the embeddings (B, W) of pooled parts, each (B, C)."""
        if self.centres is None or self.maps is None:
            return torch.cat(list(pooled), dim=1)
        rows = zip(pooled, self.centres, self.maps, strict=True)
        return torch.cat([(x - c.to(x)) @ m.to(x) for x, c, m in rows], dim=1)


MEAN = Recipe((Part("decoder", "expressed"),))
"""The recipe of models that carry none."""


def stored_parts(stored: Iterable[Any]) -> tuple[Part, ...]:
    """Return the parts that a file names.

    Args:
        stored: Layer and weights of each.

    Raises:
        TypeError: Not two texts each.
        ValueError: As `check_part`.
    """
    parts = tuple(Part(*part) for part in stored)
    for part in parts:
        check_part(part)
    return parts


def check_part(part: Part) -> None:
    """Refuse a part that no version of this code makes.

    Raises:
        ValueError: Unknown layer or weights.
    """
    top = part.weights.removeprefix(_TOP)
    known = part.weights in _POWERS or (top != part.weights and top.isdecimal() and int(top) > 0)
    if part.layer not in LAYERS or not known:
        raise ValueError(
            f"unknown part of an embedding: {part.weights} of {part.layer}; layers are "
            f"{', '.join(LAYERS)}, weights {', '.join(_POWERS)} and top_N"
        )


def pool_parts(found: Mapping[Layer, Tensor], x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Return the weighted means of some parts.

    Args:
        found: By layer (B, G, C), (G, C) for the gene vectors, (B, C) for those of `OF_CELLS`.
        x: (B, G) transformed expression; unmeasured genes are 0.
        parts: What to return.

    Returns:
        A tensor (B, C) for each part; 0 for a cell without expressed genes.
    """
    weights = {name: gene_weights(x, name) for name in {part.weights for part in parts}}
    # A matrix product: a weighted copy of the largest array here would double the memory.
    return [
        found[part.layer]
        if part.layer in OF_CELLS
        else _mean(weights[part.weights], found[part.layer])
        for part in parts
    ]


def gene_weights(x: Tensor, name: str) -> Tensor:
    """Return the weights (B, G) of the genes of cells x (B, G).

    Args:
        x: Transformed expression, >= 0.
        name: As in a part.
    """
    expressed = (x > 0).to(x.dtype)
    if name.startswith(_TOP):
        count = min(int(name.removeprefix(_TOP)), x.shape[1])
        highest = torch.sort(x, dim=1, descending=True, stable=True).indices[:, :count]
        return torch.zeros_like(x).scatter_(1, highest, 1.0) * expressed
    return expressed if name == "expressed" else x ** _POWERS[name]


def _mean(weights: Tensor, vectors: Tensor) -> Tensor:
    sums = weights.sum(dim=1, keepdim=True)
    weights = weights.to(vectors.dtype)
    if vectors.ndim == 2:
        total = weights @ vectors
    else:
        total = torch.bmm(weights[:, None, :], vectors)[:, 0]
    return total / torch.where(sums > 0, sums, 1.0)


def scaling_map(rows: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """Return what centres (C,) and maps (C, C) pooled rows of training cells.

    Args:
        rows: (n, C) one part of n training cells.
        scaling: `scaled`, or `whitened RIDGE`: the ridge, in mean variances, is added to that of
            each direction, so that one without variance stays small.

    Returns:
        float32.
    """
    rows = rows.double()
    centre = rows.mean(dim=0)
    centred = rows - centre
    width = rows.shape[1]
    covariance = centred.T @ centred / max(len(rows) - 1, 1)
    variance = covariance.diagonal().mean()
    if not variance > 0:
        return centre.float(), torch.eye(width)
    if scaling == "scaled":
        return centre.float(), (torch.eye(width) / (variance * width).sqrt()).float()
    ridge = float(scaling.removeprefix("whitened "))
    values, directions = torch.linalg.eigh(covariance)
    size = (values.clamp(min=0) + ridge * variance).sqrt() * width**0.5
    return centre.float(), (directions / size).float()
