"""Gene encoder: one vector per gene from a learned table and a convolution over the gene graph.

The output depends on parameters only, so it is computed once per forward pass. It is the sum of the
gene vectors and of the convolved gene table, either of which can be left out. The convolution
is that of Kipf and Welling (arXiv:1609.02907) without added self loops: neighbours are summed with
weights D^-1/2 A D^-1/2, D being the weighted in-degree, and then pass a linear layer; the neighbour
sum is torch-geometric's.

Shapes: G genes, C base width, E edges.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.nn import SimpleConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm

GeneGraph = tuple[np.ndarray, np.ndarray]
"""edge_index (2, E) int64 [source; target] and edge_weight (E,) float32."""


def normalised_adjacency(graph: GeneGraph, n_genes: int) -> Tensor:
    """Return the normalised adjacency as a sparse CSR matrix (target, source), float64.

    Args:
        graph: Edges [source; target] and their weights.
        n_genes: Number of genes G.
    """
    edges, weights = (torch.from_numpy(a) for a in graph)
    edges, weights = gcn_norm(edges, weights.double(), num_nodes=n_genes, add_self_loops=False)
    size = (n_genes, n_genes)
    with warnings.catch_warnings():
        # torch announces at each first use that CSR is in beta.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        by_target = torch.sparse_coo_tensor(edges.flip(0), weights, size, check_invariants=True)
        return by_target.coalesce().to_sparse_csr()


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
        self.neighbour_sum = SimpleConv(aggr="sum")
        # Made at the first use and no buffer: zero.Init and a cast of the model would round its
        # weights to bf16.
        self._graph = graph
        self._adjacency: Tensor | None = None

    def forward(self) -> Tensor:
        """Return the gene vectors (G, C)."""
        if self.table is None:
            assert self.vectors is not None
            return self.vectors
        h = self.table
        for i, linear in enumerate(self.linears):
            if i:
                h = h.relu()
            h = linear(self._convolve(h))
        return h if self.vectors is None else self.vectors + h

    def _convolve(self, h: Tensor) -> Tensor:
        if self._graph is None:
            return h
        kind = torch.promote_types(h.dtype, torch.float32)
        adjacency = self._adjacency
        if adjacency is None or adjacency.device != h.device or adjacency.dtype != kind:
            adjacency = normalised_adjacency(self._graph, len(h)).to(h.device, kind)
            self._adjacency = adjacency
        return self.neighbour_sum(h.to(kind), adjacency).to(h.dtype)
