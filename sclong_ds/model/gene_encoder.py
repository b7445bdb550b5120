"""Gene encoder: one vector per gene from a learned table and a convolution over the gene graph.

The output depends on parameters only, so it is computed once per forward pass. Once per optimizer
step, for all its micro-batches, would be exact under ZeRO-1 and 2 but saves next to nothing: 0.3 %
of the CPU time of a micro-batch of one cell of `sclong_100m`, less with more cells or layers
(`python -m benchmarks.gene_encoder`; `benchmarks.gpu_check` shows it on a GPU). Under ZeRO-3 it
would be wrong: a parameter without a gradient in a step's first micro-batch keeps that of the step
before.

The output is the sum of the gene vectors and of the convolved gene table, either of which can be
left out. The convolution is that of Kipf and Welling (arXiv:1609.02907) without added self loops:
neighbours are summed with weights D^-1/2 A D^-1/2, D being the weighted in-degree, and then pass a
linear layer.

Shapes: G genes, C base width, E edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.nn.conv.gcn_conv import gcn_norm

GeneGraph = tuple[np.ndarray, np.ndarray]
"""edge_index (2, E) int64 [source; target] and edge_weight (E,) float32."""


class SparseRows(NamedTuple):
    """A sparse matrix by rows."""

    ends: Tensor
    """int32 (G + 1,): row i has the entries from ends[i] up to ends[i + 1]."""
    columns: Tensor
    """int32 (E,)."""
    weights: Tensor
    """(E,) float."""

    def to(self, device: torch.device, dtype: torch.dtype) -> SparseRows:
        """Return the matrix on a device, with weights of a dtype."""
        ends, columns, weights = (t.to(device) for t in self)
        return SparseRows(ends, columns, weights.to(dtype))

    def times(self, h: Tensor) -> Tensor:
        """Return the product with h (G, C), in the dtype of the weights; no gradient.

        An embedding bag: each row adds up its entries in their order, on a GPU too (cuSPARSE gives
        other bits each time), and on a CPU it is several times faster than torch's CSR product.
        """
        return nn.functional.embedding_bag(
            self.columns,
            h,
            self.ends,
            mode="sum",
            per_sample_weights=self.weights,
            include_last_offset=True,
        )


def normalised_adjacency(graph: GeneGraph, n_genes: int) -> tuple[SparseRows, SparseRows]:
    """Return the normalised adjacency (target, source) and its transpose, float64.

    Args:
        graph: Edges [source; target] and their weights.
        n_genes: Number of genes G.
    """
    edges, weights = (torch.from_numpy(a) for a in graph)
    edges, weights = gcn_norm(edges, weights.double(), num_nodes=n_genes, add_self_loops=False)

    def by_row(rows: Tensor, columns: Tensor) -> SparseRows:
        order = torch.argsort(rows * n_genes + columns, stable=True)
        ends = nn.functional.pad(torch.bincount(rows, minlength=n_genes).cumsum(0), (1, 0))
        return SparseRows(ends.int(), columns[order].int(), weights[order])

    return by_row(edges[1], edges[0]), by_row(edges[0], edges[1])


class _NeighbourSum(torch.autograd.Function):
    """Product of a fixed sparse matrix with a dense one."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, matrix: SparseRows, transposed: SparseRows) -> Tensor:
        ctx.transposed = transposed
        return matrix.times(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed.times(grad.contiguous()), None, None


class GeneEncoder(nn.Module):
    """Gene vectors plus graph convolution of a gene table.

    Args:
        n_genes: Number of genes G, a token that stands for no gene included.
        dim: Base width C.
        layers: Graph convolution layers; 0 leaves the gene table out.
        graph: The gene graph; None applies the linear layers to the table alone (ablation).
        use_vectors: Whether there are gene vectors beside the convolved table.
        vectors: (genes, C) at which vectors and table start, zeros where G is larger; None draws
            normal(0, 0.02) and normal(0, 1).
    """

    def __init__(
        self,
        n_genes: int,
        dim: int,
        *,
        layers: int,
        graph: GeneGraph | None,
        use_vectors: bool = True,
        vectors: np.ndarray | None = None,
    ) -> None:
        super().__init__()

        def start(std: float) -> nn.Parameter:
            rows = nn.Parameter(torch.randn(n_genes, dim) * std)
            if vectors is not None:
                given = torch.from_numpy(np.asarray(vectors, dtype=np.float32))
                rows.data.zero_()[: len(given)].copy_(given)
            return rows

        self.vectors = start(0.02) if use_vectors else None
        self.table = start(1.0) if layers else None
        self.linears = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        # Made at the first use and no buffer: zero.Init and a cast of the model would round its
        # weights to bf16.
        self._graph = graph
        self._adjacency: tuple[SparseRows, SparseRows] | None = None
        self._kept: Tensor | None = None

    @property
    def graph(self) -> GeneGraph | None:
        """The gene graph that it was made with."""
        return self._graph

    @property
    def n_edges(self) -> int:
        """Edges of the gene graph; 0 without one."""
        return 0 if self._graph is None else self._graph[0].shape[1]

    def forward(self) -> Tensor:
        """Return the gene vectors (G, C)."""
        if self._kept is not None:
            return self._kept
        if self.table is None:
            assert self.vectors is not None
            return self.vectors
        h: Tensor = self.table
        for i, linear in enumerate(self.linears):
            if i:
                h = h.relu()
            h = linear(self._convolve(h))
        return h if self.vectors is None else self.vectors + h

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Compute the gene vectors once for all calls in the block, without gradients.

        The weights must stay as they are meanwhile. Within another such block its vectors stay.
        """
        before = self._kept
        with torch.no_grad():
            self._kept = self()
        try:
            yield
        finally:
            self._kept = before

    def _convolve(self, h: Tensor) -> Tensor:
        if self._graph is None:
            return h
        kind = torch.promote_types(h.dtype, torch.float32)
        adjacency = self._adjacency
        weights = None if adjacency is None else adjacency[0].weights
        if (
            adjacency is None
            or weights is None
            or (weights.device, weights.dtype) != (h.device, kind)
        ):
            with torch.inference_mode(False):  # training may come behind an inference
                matrix, transposed = normalised_adjacency(self._graph, len(h))
                adjacency = matrix.to(h.device, kind), transposed.to(h.device, kind)
            self._adjacency = adjacency
        return _NeighbourSum.apply(h.to(kind), *adjacency).to(h.dtype)
