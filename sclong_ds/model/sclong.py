"""scLong: masked-value reconstruction over all genes of a cell with a dual Performer encoder.

Per gene, a gene vector (gene encoder) and an expression vector (expression encoder) are added. The
top_seq_len highest-expressed genes go through the large encoder, the others through the mini
encoder; both are merged in gene order, the gene vectors are added again, and the decoder reads all
genes. A head predicts every gene's value, given that the gene is expressed. Source: the scLong
paper; `docs/explain/released-code.md` lists the differences.

Which genes the large encoder reads: with `model.routing: top` hidden values count as lowest, ties
(the many zeros) go to the lower gene index; `expressed` sends expressed and hidden genes alone
(`sclong_ds/model/routing.py`). With `model.zero_genes` only some of a cell's unexpressed genes are
read; the representation of the others is zero, and their prediction is that of the head without
context. With `model.pad_token` one more token, without a value, stands
behind the genes.

Shapes: B cells, G genes, N tokens (G, or G + 1 with the pad token), T top genes, R = N - T
remaining ones, P wanted genes, C base width, D large width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sclong_ds.config.sections import ModelConfig, PerformerConfig
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.corpus.transform import Transform
from sclong_ds.model.counts_input import check_input
from sclong_ds.model.gene_encoder import GeneEncoder, GeneGraph
from sclong_ds.model.performer import CellSpans, Performer, select_tokens
from sclong_ds.model.pooling import (
    MEAN,
    OF_CELLS,
    PRINCIPAL,
    Layer,
    Part,
    Recipe,
    along_directions,
    expressed_places,
    pool_parts,
)
from sclong_ds.model.pretrained import Pretrained
from sclong_ds.model.random_features import stack_features
from sclong_ds.model.routing import (
    ReadGenes,
    expression_order,
    inverse,
    read_genes,
    route,
    unknown_genes,
)
from sclong_ds.model.values.cell_vector import CellStart, CellVector
from sclong_ds.model.values.depth import one_count
from sclong_ds.model.values.expression_encoder import ExpressionEncoder
from sclong_ds.model.values.value_head import Output, ValueHead
from sclong_ds.model.values.zero_head import ZeroHead, expressed_chance


class Prediction(NamedTuple):
    """What a model with a zero head says of the genes of cells, (B, G) each."""

    expressed: Tensor
    """Chance that a cell like this, read as deeply, shows the gene at all."""
    given_expressed: Tensor
    """Expected value, given that it does: what the model itself returns."""
    expected: Tensor
    """The product: expected value, zeros included."""


class ScLong(Pretrained, nn.Module):
    """The model.

    Args:
        config: The `model` section.
        n_genes: Number of genes G.
        graph: The gene graph; None unless config.gene_encoder is `graph`.
        gene_vectors: (G, C) initial gene vectors or None.
        features: Random features (M, K) by `stack.layer` to use before the first redraw, or None.
        output_mean: Initial prediction with head_init `mean`: (G,) with gene_bias, else one number.
        cell_start: Where the cell's vector starts; None: at zeros and random vectors.
    """

    genes: GeneVocabulary
    """Gene order of the inputs; set on a model that `load_model` read."""
    transform: Transform
    """From counts to model input; set on a model that `load_model` read."""
    recipe: Recipe = MEAN
    """How `embed` makes a cell's vector; that of its folder on a model that `load_model` read."""
    control: Recipe | None = None
    """The same of the gene vectors alone, without context; None: its folder has none."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        n_genes: int,
        graph: GeneGraph | None,
        gene_vectors: np.ndarray | None = None,
        features: Mapping[str, Tensor] | None = None,
        output_mean: float | np.ndarray = 0.0,
        cell_start: CellStart | None = None,
    ) -> None:
        super().__init__()
        check_sizes(config, n_genes, graph, gene_vectors)
        base, large = config.base_dim, config.large_dim
        self.config, self.n_genes = config, n_genes
        self.gene_encoder = GeneEncoder(
            n_genes + config.pad_token,
            base,
            layers=config.gene_encoder_layers if config.gene_encoder != "none" else 0,
            graph=graph,
            use_vectors=config.use_gene_vectors,
            vectors=gene_vectors,
        )
        self.expression_encoder = ExpressionEncoder(
            config.expression_hidden, base, mask_max_norm=config.mask_vector_max_norm
        )
        if config.contextual_encoder != "mini":
            self.to_large = nn.Sequential(nn.Linear(base, large), nn.LayerNorm(large))
            self.large_encoder = self._performer("large_encoder", large, features)
            self.from_large = nn.Sequential(nn.Linear(large, base), nn.LayerNorm(base))
        if config.contextual_encoder != "large":
            self.mini_encoder = self._performer("mini_encoder", base, features)
        self.decoder = self._performer("decoder", base, features)
        self.norm = nn.LayerNorm(base)
        if config.cell_vector != "none":
            self.cell_vector = CellVector(n_genes, base, config.cell_vector, start=cell_start)
        mean = np.broadcast_to(output_mean, n_genes) if config.gene_bias else output_mean
        self.head = ValueHead(
            base,
            kind=config.head,
            mean=mean if config.head_init == "mean" else None,
            offset=config.cell_offset,
            cell_genes=0 if config.cell_vector == "none" else n_genes,
            direct=config.cell_vector == "residuals",
            start=cell_start,
        )
        if config.zero_head:
            self.zero_head = ZeroHead(base, np.broadcast_to(output_mean, n_genes))

    def _performer(self, name: str, dim: int, features: Mapping[str, Tensor] | None) -> Performer:
        sizes: PerformerConfig = getattr(self.config, name)
        favor = self.config.attention_of(sizes) == "favor"
        first = stack_features(features, name, sizes) if features is not None and favor else None
        return Performer(dim, sizes, self.config, name=name, first_features=first)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        unmeasured: Tensor | None = None,
        outputs: Sequence[Output] = ("value",),
    ) -> Tensor:
        """Predict the value of every gene, or of some, given that the gene is expressed.

        Training hides expressed values alone, unless `objective.zero_mask_prob` is above 0. For a
        gene with zero counts the prediction is the value that it would have were it expressed,
        not what to expect of the cell: that is what `predict` says, of a model with a zero head.

        Args:
            x: Transformed expression (B, G), >= 0, in the model's gene order.
            mask: (B, G) bool, True where the value is hidden; None hides nothing.
            positions: (B, P) int64 genes to predict; None: all. Exact, and cheaper: the end of the
                model is computed for them alone. A cell with less of them names any gene again.
            lengths: With `model.routing: expressed` (B,) how many genes of each cell the large
                encoder reads: expressed or hidden ones, top_seq_len at most. Ignored
                otherwise, and with `model.zero_genes`. None counts them, for which a GPU waits.
            unmeasured: (B, G) bool, genes of which nothing is known, whatever `x` holds there: they
                are encoded as hidden values are, and routed as unexpressed. None: all are known.
            outputs: What to say of the genes, `eta` last: the losses need other things than values.

        Returns:
            (B, G), or (B, P), predicted values; with several `outputs` (Q, B, G) or (Q, B, P).
        """
        h = self._represent(x, mask, positions, lengths, unmeasured)["decoder"]
        if self.config.cell_offset == "none" and self.config.cell_vector == "none":
            return self.head(h, positions, outputs=outputs)
        unknown = unknown_genes(mask, unmeasured, routing="top")
        visible = x > 0 if unknown is None else (x > 0) & ~unknown
        cell = None if self.config.cell_vector == "none" else self.cell_vector(x, visible)
        of_head = [name for name in outputs if name != "eta"]
        found = self.head(h, positions, x=x, visible=visible, cell=cell, outputs=of_head)
        if len(of_head) == len(outputs):
            return found
        eta = self.zero_head(cell, one_count(x, visible), positions)
        return torch.cat([found.reshape(-1, *eta.shape), eta[None]])

    def predict(
        self, x: Tensor, mask: Tensor | None = None, *, unmeasured: Tensor | None = None
    ) -> Prediction:
        """Predict of every gene the chance that it is expressed, and its expected value.

        A value that is visible is part of what its own gene's chance is read from: hide it to ask
        what the rest of the cell says.

        Args:
            x: As in `forward`.
            mask: As in `forward`.
            unmeasured: As in `forward`.

        Raises:
            ValueError: The model has no zero head.
        """
        if not self.config.zero_head:
            raise ValueError(
                "predict: the model has no zero head, so it knows values of expressed genes alone; "
                "train with model.zero_head=true, or call the model for these values"
            )
        value, eta = self(x, mask, unmeasured=unmeasured, outputs=("value", "eta"))
        chance = expressed_chance(eta)
        return Prediction(chance, value, chance * value)

    def encode(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        genes: Sequence[str] | Sequence[int] | Tensor | Literal["all"],
        lengths: Sequence[int] | None = None,
        unmeasured: Tensor | None = None,
        routes: Tensor | None = None,
    ) -> Tensor:
        """Return the contextual representations (B, P, C) of some genes of cells.

        Args:
            x: As in `forward`.
            mask: As in `forward`.
            lengths: As in `forward`.
            genes: P genes: Ensembl ids or symbols, columns, or (B, P) int64 columns by cell. "all"
                must be asked for: (B, G, C) of 27,874 genes and width 200 are 22 MB a cell. The
                last layer is computed for the wanted genes alone.
            unmeasured: As in `forward`.
            routes: (B, G) expression by whose values genes are read and divided between the
                encoders; None: by `x`. Give that of the unperturbed cell to compare a perturbed
                one with it: otherwise a deleted gene lets the gene of rank top_seq_len + 1 into the
                large encoder, which moves that gene more than any effect of the deletion.

        Raises:
            ValueError: A gene that the model lacks, or names with a model that knows none.
        """
        wanted = None if isinstance(genes, str) else self._columns(genes, x)
        if isinstance(genes, str) and genes != "all":
            raise ValueError(f'genes: got "{genes}", give a list of genes, or "all"')
        return self._represent(x, mask, wanted, lengths, unmeasured, routes=routes)["decoder"]

    def _columns(self, genes: Sequence[str] | Sequence[int] | Tensor, x: Tensor) -> Tensor:
        """Return the columns (B, P) int64 of genes for cells x (B, G)."""
        if not isinstance(genes, Tensor):
            if isinstance(next(iter(genes), 0), str):
                if not hasattr(self, "genes"):
                    raise ValueError("genes: a model that was not loaded has columns and no names")
                genes = self.genes.columns(map(str, genes))
            genes = torch.tensor(genes, dtype=torch.int64)
        whole = not genes.is_floating_point() and genes.dtype != torch.bool
        if not (whole and genes.dim() and genes.shape[:-1] in ((), (1,), (len(x),))):
            raise ValueError(f"genes: {genes.dtype} {[*genes.shape]}; give integers (P,) or (B, P)")
        genes = genes.to(x.device, torch.int64)
        if genes.numel() and not 0 <= int(genes.min()) <= int(genes.max()) < self.n_genes:
            raise ValueError(f"genes: columns must be from 0 to {self.n_genes - 1}")
        return genes.expand(len(x), -1)

    def pooled(
        self,
        x: Tensor,
        parts: Sequence[Part],
        *,
        unmeasured: Tensor | None = None,
        routes: Tensor | None = None,
        directions: Tensor | None = None,
    ) -> list[Tensor]:
        """Return weighted means of the genes' vectors, (B, C) for each part.

        Args:
            x: As in `forward`.
            parts: Which layers and weights.
            unmeasured: As in `forward`.
            routes: As in `encode`.
            directions: Those that principal parts read; None: those of the model's recipe.

        Raises:
            ValueError: A part reads a cell vector, or directions, that the model has not.
        """
        layers = {part.layer for part in parts}
        if unmeasured is not None:
            x = x.masked_fill(unmeasured, 0.0)
        found: dict[Layer, Tensor] = {}
        if layers & set(OF_CELLS):
            if self.config.cell_vector == "none":
                raise ValueError("the embedding's recipe reads a cell vector; the model has none")
            if "cell_vector" in layers:
                found["cell_vector"] = self.cell_vector(x, x > 0)
            if "cell_values" in layers:
                found["cell_values"] = self.cell_vector.of_all_values(x)
        if PRINCIPAL in layers:
            own = self.recipe.directions if directions is None else directions
            found[PRINCIPAL] = along_directions(x, own)
        places = None
        if rest := tuple(layers - {*OF_CELLS, PRINCIPAL}):
            if self.config.zero_genes is None and rest != ("gene_vectors",):
                places = expressed_places(x)  # All others have the weight 0.
            positions = None if places is None else places.genes
            found |= self._represent(x, None, positions, None, unmeasured, rest, routes=routes)
        return pool_parts(found, x, parts, places)

    def embed(self, x: Tensor, *, unmeasured: Tensor | None = None) -> Tensor:
        """Return the embeddings (B, W) of cells by `recipe`; 0 for a cell without counts.

        Args:
            x: As in `forward`.
            unmeasured: As in `forward`.
        """
        known = x if unmeasured is None else x.masked_fill(unmeasured, 0.0)
        found = self.recipe.apply(self.pooled(x, self.recipe.parts, unmeasured=unmeasured))
        return torch.where((known > 0).any(dim=1, keepdim=True), found, 0.0)

    def _represent(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        lengths: Sequence[int] | None,
        unmeasured: Tensor | None,
        layers: Sequence[Layer] = ("decoder",),
        *,
        routes: Tensor | None = None,
    ) -> dict[Layer, Tensor]:
        """Return the representations (B, G, C), or (B, P, C), behind some layers.

        Arguments as `forward`. The gene vectors are (G, C). Behind the encoders, `positions` are
        of models that read all genes.
        """
        genes = self.gene_encoder()
        found: dict[Layer, Tensor] = {}
        if "gene_vectors" in layers:
            found["gene_vectors"] = genes[: self.n_genes]
        if set(layers) <= {"gene_vectors"}:
            return found
        check_input(self, x, mask, unmeasured)
        routed = x if routes is None else routes
        if unmeasured is not None:
            x, routed = x.masked_fill(unmeasured, 0.0), routed.masked_fill(unmeasured, 0.0)
        no_value = unknown_genes(mask, unmeasured, routing="top")
        mask = unknown_genes(mask, unmeasured, routing=self.config.routing)
        if self.config.pad_token:
            x, routed = nn.functional.pad(x, (0, 1)), nn.functional.pad(routed, (0, 1))
            mask = None if mask is None else nn.functional.pad(mask, (0, 1))
            no_value = None if no_value is None else nn.functional.pad(no_value, (0, 1))
        if self.config.zero_genes is not None:
            read = self._read(routed, mask, unmeasured)
            return found | self._represent_read(genes, x, no_value, read, positions, layers)
        tokens = self.expression_encoder(x, no_value) + genes
        merged = self._contextual(tokens, routed, mask, lengths) + genes
        if "encoders" in layers:
            own = merged[:, : self.n_genes]
            found["encoders"] = own if positions is None else select_tokens(merged, positions)
        if "decoder" in layers:
            h = self.norm(self.decoder(merged, None, positions))
            found["decoder"] = h[:, : self.n_genes] if positions is None else h
        return found

    def decoder_tokens(self, x: Tensor, *, unmeasured: Tensor | None = None) -> Tensor:
        """Return the genes (T,) int64 that the decoder reads of one cell, in its order.

        Args:
            x: As in `forward`, of one cell.
            unmeasured: As in `forward`.
        """
        if self.config.zero_genes is None:
            return torch.arange(self.n_genes, device=x.device)
        if unmeasured is not None:
            x = x.masked_fill(unmeasured, 0.0)
        mask = unknown_genes(None, unmeasured, routing=self.config.routing)
        return self._read(x, mask, unmeasured).rows

    def _read(self, x: Tensor, mask: Tensor | None, unmeasured: Tensor | None) -> ReadGenes:
        """Return which genes of the cells are read."""
        assert self.config.zero_genes is not None
        return read_genes(
            x,
            mask,
            unmeasured,
            top_seq_len=self.config.top_seq_len,
            zero_genes=self.config.zero_genes,
        )

    def _represent_read(
        self,
        genes: Tensor,
        x: Tensor,
        no_value: Tensor | None,
        read: ReadGenes,
        positions: Tensor | None,
        layers: Sequence[Layer],
    ) -> dict[Layer, Tensor]:
        """Return the representations where only some of the unexpressed genes are read.

        That of a gene that is not read is zero.
        """
        # By indexing: its backward pass adds up in a fixed order on a GPU too.
        own = genes[read.rows % self.n_genes]
        no_value = None if no_value is None else no_value.flatten()[read.rows]
        tokens = self.expression_encoder(x.flatten()[read.rows], no_value) + own
        merged = self._contextual_read(tokens, read) + own
        found: dict[Layer, Tensor] = {}
        if "encoders" in layers:
            found["encoders"] = nn.functional.pad(merged, (0, 0, 0, 1))[read.places]
        if "decoder" in layers:
            h = nn.functional.pad(self.norm(self.decoder(merged, read.cells)), (0, 0, 0, 1))
            places = read.places if positions is None else read.places.gather(1, positions)
            found["decoder"] = h[places]
        return found

    def _contextual_read(self, tokens: Tensor, read: ReadGenes) -> Tensor:
        """Return the tokens (T, C), in the order given, after the large and the mini encoder."""
        if self.config.contextual_encoder == "mini":
            return self.mini_encoder(tokens, read.cells)
        merged = self._encoded(tokens.index_select(0, read.order), read.high, read.low)
        return merged.index_select(0, inverse(read.order))

    def _contextual(
        self, tokens: Tensor, x: Tensor, mask: Tensor | None, lengths: Sequence[int] | None
    ) -> Tensor:
        """Return the tokens (B, N, C), in gene order, after the large and the mini encoder."""
        if self.config.contextual_encoder == "mini":
            return self.mini_encoder(tokens)
        if self.config.routing == "expressed":
            return self._contextual_packed(tokens, x, mask, lengths)
        order = expression_order(x, mask)
        ordered = select_tokens(tokens, order)
        split = self.config.top_seq_len
        high = self.from_large(self.large_encoder(self.to_large(ordered[:, :split])))
        low = ordered[:, split:]
        if self.config.contextual_encoder == "dual":
            low = self.mini_encoder(low)
        return select_tokens(torch.cat([high, low], dim=1), inverse(order))

    def _contextual_packed(
        self, tokens: Tensor, x: Tensor, mask: Tensor | None, lengths: Sequence[int] | None
    ) -> Tensor:
        """Return the same with each cell's own number of tokens in the large encoder."""
        routes = route(x, mask, top_seq_len=self.config.top_seq_len, lengths=lengths)
        ordered = tokens.flatten(0, 1).index_select(0, routes.order)
        merged = self._encoded(ordered, routes.high, routes.low)
        return merged.index_select(0, routes.places).view(tokens.shape)

    def _encoded(self, ordered: Tensor, high: CellSpans, low: CellSpans) -> Tensor:
        """Return packed tokens (T, C) after the encoders: first the large one's, then the rest."""
        split = sum(high.lengths)
        first = self.from_large(self.large_encoder(self.to_large(ordered[:split]), high))
        rest = ordered[split:]
        if self.config.contextual_encoder == "dual":
            rest = self.mini_encoder(rest, low)
        return torch.cat([first, rest])

    def performers(self) -> dict[str, Performer]:
        """Return the Performer stacks by name."""
        return {name: part for name, part in self.named_children() if isinstance(part, Performer)}

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
    if config.gene_encoder != "graph" and graph is not None:
        raise ValueError(
            f"model.gene_graph is set but model.gene_encoder={config.gene_encoder} would ignore "
            f"it: set it to null"
        )
    if config.contextual_encoder != "mini" and config.top_seq_len >= n_genes:
        raise ValueError(
            f"model.top_seq_len: got {config.top_seq_len}, "
            f"must be below the number of genes {n_genes}"
        )
    if gene_vectors is not None and gene_vectors.shape != (n_genes, config.base_dim):
        raise ValueError(
            f"model.gene_vectors: got an array of shape {gene_vectors.shape}, "
            f"must be ({n_genes}, {config.base_dim}): (genes, model.base_dim)"
        )
