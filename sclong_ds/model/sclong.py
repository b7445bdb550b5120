"""scLong: masked-value reconstruction over all genes of a cell with a dual Performer encoder.

Per gene, a gene vector (gene encoder) and an expression vector (expression encoder) are added. The
top_seq_len highest-expressed genes go through the large encoder, the others through the mini
encoder; both are merged in gene order, the gene vectors are added again, and the decoder reads all
genes. A head predicts every gene's value. Source: the scLong paper; `README.md` lists the
differences.

Which genes the large encoder reads: hidden values count as lowest, ties (the many zeros) go to the
lower gene index.

Shapes: B cells, G genes, T top genes, R = G - T remaining genes, C base width, D large width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sclong_ds.config import ModelConfig, PerformerConfig
from sclong_ds.genes import GeneVocabulary
from sclong_ds.model.expression_encoder import ExpressionEncoder
from sclong_ds.model.gene_encoder import GeneEncoder, GeneGraph
from sclong_ds.model.performer import Performer


def expression_order(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the genes of each cell by falling value; hidden values last, ties by lower gene index.

    Args:
        x: Transformed expression (B, G), >= 0.
        mask: (B, G) bool, True where the value is hidden, or None.

    Returns:
        (B, G) int64 gene indices.
    """
    keys = x if mask is None else x.masked_fill(mask, -1.0)
    return torch.sort(keys, dim=1, descending=True, stable=True).indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """From raw counts to model input: log1p(target_sum * count / total over the model's genes)."""

    name: str
    """Always log1p_total in this version."""
    target_sum: float
    """Counts of a cell after scaling."""


class ValueHead(nn.Module):
    """Predicts a gene's value from its representation; starts as the mean it is given.

    Args:
        dim: Base width C.
        kind: `mlp` or `linear`.
        mean: Initial prediction: one number, or one per gene (G,), which makes a learned bias per
            gene.
    """

    def __init__(self, dim: int, *, kind: str, mean: float | np.ndarray) -> None:
        super().__init__()
        self.body = (
            nn.Sequential(nn.Linear(dim, dim), nn.GELU()) if kind == "mlp" else nn.Identity()
        )
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.tensor(np.atleast_1d(mean), dtype=torch.float32))

    def forward(self, h: Tensor) -> Tensor:
        """Return predicted values (B, G) for representations (B, G, C)."""
        return self.body(h) @ self.weight + self.bias


class ScLong(nn.Module):
    """The model.

    Args:
        config: The `model` section.
        n_genes: Number of genes G.
        graph: The gene graph; None only when config.gene_encoder is `embedding`.
        gene_vectors: (G, C) initial gene vectors or None.
        output_mean: Initial prediction: per gene (G,) when config.gene_bias, else one number.
    """

    genes: GeneVocabulary
    """Gene order of the inputs; set on a model that `load_model` read."""
    transform: Transform
    """From counts to model input; set on a model that `load_model` read."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        n_genes: int,
        graph: GeneGraph | None,
        gene_vectors: np.ndarray | None = None,
        output_mean: float | np.ndarray = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(config, n_genes, graph, gene_vectors)
        base, large = config.base_dim, config.large_dim
        self.config, self.n_genes = config, n_genes
        self.gene_encoder = GeneEncoder(
            n_genes, base, layers=config.gene_encoder_layers, graph=graph, vectors=gene_vectors
        )
        self.expression_encoder = ExpressionEncoder(config.expression_hidden, base)
        self.to_large = nn.Sequential(nn.Linear(base, large), nn.LayerNorm(large))
        self.large_encoder = self._performer("large_encoder", large, config.large_encoder)
        self.from_large = nn.Sequential(nn.Linear(large, base), nn.LayerNorm(base))
        self.mini_encoder = self._performer("mini_encoder", base, config.mini_encoder)
        self.decoder = self._performer("decoder", base, config.decoder)
        self.norm = nn.LayerNorm(base)
        mean = np.broadcast_to(output_mean, n_genes) if config.gene_bias else output_mean
        self.head = ValueHead(base, kind=config.head, mean=mean)

    def _performer(self, name: str, dim: int, sizes: PerformerConfig) -> Performer:
        return Performer(
            dim,
            sizes,
            name=name,
            qkv_bias=self.config.qkv_bias,
            scope=self.config.stabiliser_scope,
            seed=self.config.projection_seed,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict the value of every gene.

        Args:
            x: Transformed expression (B, G), >= 0, in the model's gene order.
            mask: (B, G) bool, True where the value is hidden; None hides nothing.

        Returns:
            (B, G) predicted values.
        """
        return self.head(self.encode(x, mask))

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the contextual representations (B, G, C); arguments as `forward`."""
        genes = self.gene_encoder()
        tokens = self.expression_encoder(x, mask) + genes
        order = expression_order(x, mask)
        ordered = _permute(tokens, order)
        split = self.config.top_seq_len
        high = self.from_large(self.large_encoder(self.to_large(ordered[:, :split])))
        low = self.mini_encoder(ordered[:, split:])
        merged = _permute(torch.cat([high, low], dim=1), torch.argsort(order, dim=1))
        return self.norm(self.decoder(merged + genes))

    def performers(self) -> dict[str, Performer]:
        """Return the three Performer stacks by name."""
        names = ("large_encoder", "mini_encoder", "decoder")
        return {name: getattr(self, name) for name in names}

    def redraw_features(self, redraw_index: int) -> None:
        """Make every stack use the random features of this redraw index."""
        for performer in self.performers().values():
            performer.redraw_index = redraw_index


def check_sizes(
    config: ModelConfig, n_genes: int, graph: GeneGraph | None, gene_vectors: np.ndarray | None
) -> None:
    """Check what the configuration needs against what was given.

    Raises:
        ValueError: A graph is missing or unused, or a size does not fit.
    """
    if config.gene_encoder == "graph" and graph is None:
        raise ValueError(
            "model.gene_graph is needed: build it with `python -m data_prep gene-graph "
            "--out graph.npz` and set model.gene_graph=graph.npz, or train without a graph "
            "with model.gene_encoder=embedding"
        )
    if config.gene_encoder == "embedding" and graph is not None:
        raise ValueError(
            "model.gene_graph is set but model.gene_encoder=embedding would ignore it: "
            "set it to null"
        )
    if config.top_seq_len >= n_genes:
        raise ValueError(
            f"model.top_seq_len: got {config.top_seq_len}, "
            f"must be below the number of genes {n_genes}"
        )
    if gene_vectors is not None and gene_vectors.shape != (n_genes, config.base_dim):
        raise ValueError(
            f"model.gene_vectors: got an array of shape {gene_vectors.shape}, "
            f"must be ({n_genes}, {config.base_dim}): (genes, model.base_dim)"
        )


def _permute(tokens: Tensor, order: Tensor) -> Tensor:
    """Return tokens (B, G, C) reordered along genes by `order` (B, G); no host synchronisation."""
    b, g, c = tokens.shape
    offsets = torch.arange(b, device=order.device)[:, None] * g
    return tokens.reshape(b * g, c).index_select(0, (order + offsets).reshape(-1)).view(b, g, c)
