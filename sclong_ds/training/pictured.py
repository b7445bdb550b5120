"""What the pictures of a validation need, collected over all ranks.

`sclong_ds.training.validation` calls `Pictures.show` after it has scored the held-out cells. The
model reads some of them once more, with nothing hidden and with all genes wanted, as `embed` does:
their embeddings, and of the genes whose values vary most the mean encodings and the decoder's
attention. Rank 0 hands all of it to `Tracker.draw`. Nothing here ends a run: what cannot be read is
left out, and when a rank is asked to stop there are no pictures.

Shapes: B cells, G genes, N tokens, S shown genes, C base width, H heads, K head width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sclong_ds.config.sections import EngineConfig
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.parts.views import sample
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.engine.ranks import Ranks, sum_over_ranks
from sclong_ds.model.attention_use import cells_of, computed_weights
from sclong_ds.model.performer import PerformerLayer, SelfAttention
from sclong_ds.model.routing import read_genes
from sclong_ds.model.sclong import ScLong
from sclong_ds.training.run import Opened

# The messages are part of the training log.
log = logging.getLogger("sclong_ds.pretrain")

SHOWN_GENES = 40
"""Genes of the gene-gene pictures: as many names as a picture has room for."""

LABELS = ("cell_type", "celltype", "cell_label", "cell_ontology_class", "annotation", "label")
"""Columns of obs that name a cell's kind, most telling first; spelling as `_plain_name` leaves."""


class Pictures:
    """Hands over what the pictures of validations need; all ranks together.

    Args:
        wanted: Cells that are drawn (`tracking.picture_cells`); None: no pictures.
        opened: What the run has open.
        engine: Section engine.
    """

    def __init__(self, wanted: int | None, opened: Opened, engine: EngineConfig) -> None:
        self._wanted, self._micro_batch = wanted, engine.train_micro_batch_size_per_gpu
        self._compiled = engine.compile_layers
        self._cells, self._model, self._engine = opened.cells, opened.model, opened.engine
        self._ranks, self._stop, self._watchdog = opened.ranks, opened.stop, opened.watchdog
        self._tracker = opened.tracker

    def show(
        self, step: int, *, predicted_true: NDArray[np.float32], times: NDArray[Any] | None
    ) -> None:
        """Collect and hand over what the pictures of this validation need; every rank must call it.

        Args:
            step: The last finished step.
            predicted_true: (2, n) predicted and true values of all ranks' targets, on rank 0.
            times: (ranks, columns) of `RankTimes.gather`.
        """
        wanted = self._wanted
        if wanted is None:
            return
        data: dict[str, NDArray[Any]] = {"predicted_true": predicted_true}
        if times is not None:
            data["rank_times"] = times
        rows = sample(self._cells.corpus, "validation", wanted)
        if len(rows):
            data |= self._encoded(step, rows)
        if self._ranks.rank == 0:
            self._tracker.draw(step, data)

    def _encoded(self, step: int, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return what the model makes of cells, on rank 0; nothing if a rank cannot continue."""
        ranks, cells = self._ranks, self._cells
        mine, problem = rows[ranks.rank :: ranks.world_size], None
        try:
            x = log1p_normalise(cells.corpus.rows(mine), target_sum=cells.data.target_sum)
        except (ValueError, OSError) as error:
            problem = str(error)
            log.warning("pictures of cells are left out on all ranks: %s", problem)
        if sum_over_ranks(ranks, problem is not None)[0]:
            return {}
        genes = _varying_genes(ranks, x)
        sums = _GeneSums(self._model, genes, device=ranks.device, compiled=self._compiled)
        unmeasured = None if cells.measured is None else cells.measured.of(mine).unmeasured()
        longest = -(-len(rows) // ranks.world_size)
        embedded = self._embed(step, x, unmeasured, longest=longest, sums=sums)
        if embedded is None:
            return {}
        everyone: list[Any] = [None] * ranks.world_size
        found = (mine, embedded, (x > 0).sum(axis=1))
        dist.all_gather_object(everyone, found, group=ranks.control)
        shown, embeddings, n_expressed = (
            np.concatenate(part) for part in zip(*everyone, strict=True)
        )
        data = {"embedding": embeddings, "n_expressed": n_expressed} | sums.means()
        data["gene_symbols"] = np.array([cells.corpus.genes.symbols[g] for g in genes])
        return data | _annotation(cells.corpus, shown) if ranks.rank == 0 else {}

    def _embed(
        self,
        step: int,
        x: NDArray[np.float32],
        unmeasured: NDArray[np.bool_] | None,
        *,
        longest: int,
        sums: _GeneSums,
    ) -> NDArray[np.float32] | None:
        """Return the embeddings (B, C) of this rank's cells; None when a rank was asked to stop.

        Args:
            step: The last finished step.
            x: (B, G) transformed expression.
            unmeasured: (B, G) genes that the cells' datasets do not measure, or None.
            longest: Most cells of a rank: all ranks make as many forward passes.
            sums: Takes what the pictures of genes need.
        """
        size, device = self._micro_batch, self._ranks.device
        parts = [np.zeros((0, self._cells.model.base_dim), dtype=np.float32)]
        self._engine.eval()
        try:
            with sums.listening():
                for start in range(0, longest, size):
                    self._watchdog.beat(step, "validation: pictures")
                    if sum_over_ranks(self._ranks, self._stop.reason() is not None)[0]:
                        return None
                    own = x[start : start + size]
                    n_own = len(own)
                    # A rank without cells left makes the pass too, or ZeRO-3 hangs.
                    own = own if n_own else np.zeros((1, x.shape[1]), dtype=np.float32)
                    values, unknown = torch.from_numpy(own).to(device), None
                    if unmeasured is not None:
                        # Of the cell of a rank that has none left everything is known.
                        known = np.zeros(own.shape, dtype=bool)
                        known[:n_own] = unmeasured[start : start + size]
                        unknown = torch.from_numpy(known).to(device)
                    self._engine(values, unmeasured=unknown)
                    embedded = sums.add(values, unknown)
                    parts.append(embedded[:n_own].cpu().numpy())
        finally:
            self._engine.train()
        return np.concatenate(parts)


def _varying_genes(ranks: Ranks, x: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the (S,) genes whose values vary most over the cells of all ranks, by gene index."""
    device = ranks.device
    values = torch.from_numpy(x).to(device, torch.float64)
    moments = torch.stack([values.sum(0), values.square().sum(0)])
    n_cells = sum_over_ranks(ranks, len(x))[0]
    dist.all_reduce(moments)
    mean, square = moments / n_cells
    count = min(SHOWN_GENES, len(mean))
    chosen = torch.topk(square - mean.square(), count).indices.sort().values
    dist.broadcast(chosen, src=0)
    return chosen.cpu().numpy()


class _GeneSums:
    """Sums over cells of the shown genes' encodings and attention, of the pass that just ran.

    Args:
        model: The model.
        genes: (S,) shown genes.
        device: The rank's device.
        compiled: Whether its layers are compiled, which do not call the hooks of their parts.
    """

    def __init__(
        self, model: ScLong, genes: NDArray[np.int64], *, device: torch.device, compiled: bool
    ) -> None:
        self._model, self._compiled, n = model, compiled, len(genes)
        self._genes = torch.from_numpy(genes).to(device)
        self._encoded = torch.zeros(n, model.config.base_dim + 1, device=device)
        self._attention = torch.zeros(n, n + 1, device=device)
        self._h: Tensor | None = None
        self._qkv: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the encodings and the decoder's last queries and keys of every forward pass."""

        def keep_encodings(_: Any, inputs: tuple[Any, ...]) -> None:
            self._h = inputs[0]

        def keep_projections(_: Any, __: Any, output: Tensor) -> None:
            self._qkv = output

        model = self._model
        handles = [model.head.register_forward_pre_hook(keep_encodings)]
        if not self._compiled:
            last = model.decoder.layers[-1]
            assert isinstance(last, PerformerLayer)
            handles.append(last.attention.to_qkv.register_forward_hook(keep_projections))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, x: Tensor, unmeasured: Tensor | None = None) -> Tensor:
        """Add the cells (B, G) that the pass read, and return their embeddings (B, C).

        Args:
            x: (B, G) values.
            unmeasured: (B, G) bool as the pass read it, or None.
        """
        assert self._h is not None
        h, expressed = self._h.float(), (x > 0).float()
        shown = expressed[:, self._genes]
        weighted = h[:, self._genes] * shown[:, :, None]
        self._encoded[:, :-1] += weighted.sum(0)
        self._encoded[:, -1] += shown.sum(0)
        if self._qkv is not None:
            attention = self._computed_attention(self._qkv, x, unmeasured) * shown[:, :, None]
            self._attention[:, :-1] += attention.sum(0)
            self._attention[:, -1] += shown.sum(0)
        # As `embed` pools: the mean over the genes that a cell expresses.
        total = torch.bmm(expressed[:, None, :], h)[:, 0]
        return total / expressed.sum(dim=1, keepdim=True).clamp(min=1.0)

    def _computed_attention(self, qkv: Tensor, x: Tensor, unmeasured: Tensor | None) -> Tensor:
        """Return (B, S, S) the weights that the layer gives the shown genes, times N.

        Mean over heads, of the queries of shown genes. 1 is what a gene gets when all get the same;
        a gene that the model did not read gets 0.
        """
        decoder = self._model.decoder
        layer: SelfAttention = decoder.layers[-1].attention  # type: ignore[assignment]
        features = decoder.features(qkv.device)[-1] if decoder.favor else None
        shares = []
        for cell, places in self._cells(qkv, x, unmeasured):
            # A cell at a time: all of a batch in float32 would be gigabytes.
            n = len(cell)
            ((q, k, _),) = cells_of(cell[None], layer, None)
            found = computed_weights(q[places.clamp(max=n - 1)], k, features, layer)
            share = torch.nn.functional.pad(found.weights, (0, 1))[..., places].mean(dim=0)
            shares.append(share * n)
        return torch.stack(shares)

    def _cells(
        self, qkv: Tensor, x: Tensor, unmeasured: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each cell's projections (N, 3 I), and the places (S,) of the shown genes there.

        The place of a gene that the model did not read is N.
        """
        model = self._model.config
        if model.zero_genes is None:
            yield from ((cell, self._genes) for cell in qkv)
            return
        read = read_genes(
            x, None, unmeasured, top_seq_len=model.top_seq_len, zero_genes=model.zero_genes
        )
        start = 0
        for n, places in zip(read.cells.lengths, read.places[:, self._genes], strict=True):
            yield qkv[start : start + n], (places - start).clamp(max=n)
            start += n

    def means(self) -> dict[str, NDArray[Any]]:
        """Return the means over the cells of all ranks that express the gene."""
        dist.all_reduce(self._encoded)
        dist.all_reduce(self._attention)
        encoded, attention = self._encoded.cpu().numpy(), self._attention.cpu().numpy()
        found = {"gene_encodings": encoded[:, :-1] / np.maximum(encoded[:, -1:], 1)}
        if attention[:, -1].any():
            found["gene_attention"] = attention[:, :-1] / np.maximum(attention[:, -1:], 1)
        return found


def _annotation(corpus: Corpus, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return dataset and label of cells; without the label where the corpus has none."""
    try:
        obs = corpus.obs(rows)
    except (ValueError, OSError) as error:
        log.warning("pictures of cells are without their annotation: %s", error)
        return {}
    found = {"dataset": obs["dataset_id"].astype(str).to_numpy(dtype=str)}
    columns = {_plain_name(str(column)): column for column in obs.columns}
    name = next((name for name in LABELS if name in columns), None)
    if name is not None:
        found["label"] = obs[columns[name]].fillna("").astype(str).to_numpy(dtype=str)
        found["label_name"] = np.array(str(columns[name]))
    return found


def _plain_name(column: str) -> str:
    return re.sub(r"[\s.-]+", "_", column.strip().lower())
