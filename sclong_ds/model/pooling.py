"""From the vectors of a cell's genes to one vector of the cell: the recipe of an embedding.

A recipe is one or several parts, concatenated. A part is a weighted mean over genes of

- `decoder`: the contextual representations behind the decoder (`ScLong.encode`),
- `encoders`: those in front of it, behind the large and the mini encoder,
- `gene_vectors`: the model's gene vectors, without any context,

or, with `model.cell_vector`, the `cell_vector` itself, or `cell_values`: all values, those of
unexpressed and unmeasured genes as 0, summed with the cell vector's vectors of the genes. The
cell's vector leaves out what is not expressed, since a hidden value must not be told from a zero;
but which genes are not expressed tells tissues apart. The weights of both are their own (named
`expressed`). `principal` needs no model: all values along C principal directions of training
cells, the block of C that its weights name (`block_1`, `block_2` ...); the recipe carries them, and
cuts the last block where their number is no multiple of C.
Elsewhere the weight of a gene in the cell is

- `expressed`: 1 if it has a count,
- `value`, `value^3`: a power of its value: of high genes, each part is more of the mean,
- `top_N`: 1 for the N expressed genes of highest value (ties: the lower gene index).

A mean over all expressed genes is drowned by what all cells express; the highest genes tell cells
apart. Parts are then centred and scaled to variance 1 in all (`scaled`), or all by one number
(`scaled together`), or along each of their principal directions (`whitened`), by statistics of
training cells, or left as they are (`none`).

Shapes: B cells, G genes, C base width, W width of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Layer = Literal["decoder", "encoders", "gene_vectors", "cell_vector", "cell_values", "principal"]
LAYERS: tuple[Layer, ...] = (
    "decoder", "encoders", "gene_vectors", "cell_vector", "cell_values", "principal",
)  # fmt: skip
OF_CELLS: tuple[Layer, ...] = ("cell_vector", "cell_values")
"""Those that are a vector of the cell already, of models with `model.cell_vector`."""
PRINCIPAL: Layer = "principal"
TOGETHER = "scaled together"
_ALONG_PRINCIPAL = "all values, zeros too, along principal directions of training cells"
_TOP, _BLOCK = "top_", "block_"
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
        if self.layer == PRINCIPAL:
            return f"{_ALONG_PRINCIPAL}, block {self.weights.removeprefix(_BLOCK)}"
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
    directions: Tensor | None = None
    """(blocks, G, C) principal directions of training cells; None where no part reads them."""
    n_directions: int = 0
    """How many of them the embedding has, of parts that read nothing else; 0: no part does."""

    def text(self) -> str:
        """Return the recipe in words."""
        named = [part.text() for part in self.parts if part.layer != PRINCIPAL]
        if len(self.parts) > len(named):
            named.append(f"{_ALONG_PRINCIPAL}, the first {self.n_directions}")
        parts = "; ".join(named)
        return parts if self.scaling == "none" else f"{parts}; {self.scaling}"

    def width(self, base_dim: int) -> int:
        """Return the width W for a model of base width C."""
        return self.n_directions or len(self.parts) * base_dim

    def apply(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the embeddings (B, W) of pooled parts, each (B, C)."""
        if self.centres is not None and self.maps is not None:
            rows = zip(pooled, self.centres, self.maps, strict=True)
            pooled = [(x - c.to(x)) @ m.to(x) for x, c, m in rows]
        return torch.cat(list(pooled), dim=1)[:, : self.n_directions or None]


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
    prefix = _BLOCK if part.layer == PRINCIPAL else _TOP
    number = part.weights.removeprefix(prefix)
    known = number != part.weights and number.isdecimal() and int(number) > 0
    known |= part.layer != PRINCIPAL and part.weights in _POWERS
    if part.layer not in LAYERS or not known:
        raise ValueError(
            f"unknown part of an embedding: {part.weights} of {part.layer}; layers are "
            f"{', '.join(LAYERS)}, weights {', '.join(_POWERS)} and top_N, block_N of {PRINCIPAL}"
        )


def principal_recipe(n: int, base_dim: int, scaling: str = "none") -> Recipe:
    """Return the recipe of the first n principal directions, without these and statistics."""
    blocks = range(-(-n // base_dim))
    parts = tuple(Part(PRINCIPAL, f"{_BLOCK}{i + 1}") for i in blocks)
    return Recipe(parts, scaling, n_directions=n)


def along_directions(x: Tensor, directions: Tensor | None) -> Tensor:
    """Return all values x (B, G) along directions (blocks, G, C), (blocks, B, C) float32 at least.

    Raises:
        ValueError: No directions: the recipe that a part is of was not given with them.
    """
    if directions is None:
        raise ValueError("the embedding's recipe reads principal directions, and has none")
    kind = torch.promote_types(x.dtype, torch.float32)
    return x.to(kind) @ directions.to(x.device, kind)


class Places(NamedTuple):
    """Where the genes lie that a cell expresses; P: the most of any cell, 1 at least."""

    genes: Tensor
    """(B, P) int64, rising; 0 behind those of a cell with fewer."""
    there: Tensor
    """(B, P) bool: whether a place is of a gene."""


def expressed_places(x: Tensor) -> Places:
    """Return the expressed genes of cells x (B, G), for which a GPU waits."""
    cells, genes = torch.nonzero(x > 0, as_tuple=True)
    n = torch.bincount(cells, minlength=len(x))
    most = max(1, int(n.max())) if len(n) else 1
    there = torch.arange(most, device=x.device) < n[:, None]
    places = torch.zeros(there.shape, dtype=torch.int64, device=x.device)
    places[there] = genes  # Both go cell by cell.
    return Places(places, there)


def pool_parts(
    found: Mapping[Layer, Tensor], x: Tensor, parts: Sequence[Part], places: Places | None = None
) -> list[Tensor]:
    """Return the weighted means of some parts.

    Args:
        found: By layer (B, G, C), or (B, P, C) with `places`, (G, C) for the gene vectors, (B, C)
            for those of `OF_CELLS`, (blocks, B, C) for `principal`.
        x: (B, G) transformed expression; unmeasured genes are 0.
        parts: What to return.
        places: Genes that the vectors are of; None: all.

    Returns:
        A tensor (B, C) for each part; 0 for a cell without expressed genes.
    """
    of_genes = {part.weights for part in parts if part.layer not in (*OF_CELLS, PRINCIPAL)}
    weights = {name: gene_weights(x, name) for name in of_genes}

    def one(part: Part) -> Tensor:
        if part.layer in OF_CELLS:
            return found[part.layer]
        if part.layer == PRINCIPAL:
            return found[PRINCIPAL][int(part.weights.removeprefix(_BLOCK)) - 1]
        # A matrix product: a weighted copy of the largest array here would double the memory.
        weight, vectors = weights[part.weights], found[part.layer]
        if places is not None and vectors.ndim == 3:
            weight = weight.gather(1, places.genes) * places.there
        return _mean(weight, vectors)

    return [one(part) for part in parts]


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


def scaling_maps(parts: Sequence[Tensor], scaling: str) -> tuple[Tensor, Tensor]:
    """Return centres (parts, C) and maps (parts, C, C) of pooled rows of training cells.

    Args:
        parts: (n, C) each.
        scaling: As in `scaling_map`, or `scaled together`: all parts by one number, so that they
            have variance 1 in all.
    """
    if scaling != TOGETHER:
        found = [scaling_map(part, scaling) for part in parts]
        return torch.stack([c for c, _ in found]), torch.stack([to for _, to in found])
    rows = torch.stack([part.double() for part in parts])
    centred = rows - rows.mean(dim=1, keepdim=True)
    variance = centred.square().sum() / max(rows.shape[1] - 1, 1)
    size = 1 / variance.sqrt() if variance > 0 else torch.ones(())
    maps = (torch.eye(rows.shape[2]) * size).expand(len(parts), -1, -1)
    return rows.mean(dim=1).float(), maps.float().contiguous()
