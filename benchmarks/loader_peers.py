"""The other loaders of the loader benchmark: annbatch; scDataset and bionemo-scdl if installed.

    python -m benchmarks.loader_peers list | u16 WORK | NAME WORK

lists the stores it can make, writes the source files of WORK with uint16 counts, or converts them
to the store NAME and prints what that cost; as JSON. Python 3.12
with `annbatch[zarrs]` is needed, torch only for annbatch's documented way to dense batches, for
scDataset and for bionemo-scdl. Sources: https://annbatch.readthedocs.io (0.3.1),
https://scdataset.github.io (0.3.0), https://pypi.org/project/bionemo-scdl (0.1.3)
"""

from __future__ import annotations

import json
import queue
import resource
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import zarr
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack
from zarr.codecs import BloscCodec

from benchmarks.loader_cells import TARGET_SUM, Contender, Loaded, SourceCells


@dataclass(frozen=True, slots=True)
class AnnbatchStore:
    """How a store of annbatch is written."""

    whole: bool
    """uint16 counts instead of the float32 of the files."""
    codec: str = "lz4"
    """lz4 (its default), zstd or none."""
    rows: int = 64
    """Mean rows of a chunk (its default)."""


STORES = {
    "annbatch f32 lz4 (default)": AnnbatchStore(whole=False),
    "annbatch u16 lz4": AnnbatchStore(whole=True),
    "annbatch u16 lz4, 256 rows": AnnbatchStore(whole=True, rows=256),
    "annbatch u16 zstd": AnnbatchStore(whole=True, codec="zstd"),
    "annbatch u16 uncompressed": AnnbatchStore(whole=True, codec="none"),
}
LZ4, PLAIN = "annbatch u16 lz4", "annbatch u16 uncompressed"
QUEUE = 32
"""Batches that a user's thread keeps ready."""
ARGUMENTS = ((32, 256), (512, 16), (512, 32))
"""(chunk_size, preload_nchunks): the README's, a pool of 8,192 in long reads, the tutorial's."""
SCDL = "bionemo-scdl"
SCDATASET = "scDataset on h5ad"
BLOCKS = (16, 64)
"""Rows that scDataset reads in one piece."""
FETCH_FACTOR = 32
"""Batches that it reads at a time: 32 of 256 are the pool of 8,192 that the others get."""


def use_zarrs() -> None:
    """Choose the fast codec pipeline, which annbatch's documentation asks for."""
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def folder_of(name: str, work: Path) -> Path:
    """Return where a store lies."""
    return work / (name.replace(" ", "_").replace(",", "").strip("()") + ".zarr")


def write_whole(source: SourceCells, folder: Path) -> None:
    """Write the files again with uint16 counts."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in source.paths:
        file = anndata.read_h5ad(path)
        assert file.X.max() < 2**16
        file.X = file.X.astype(np.uint16)
        file.write_h5ad(partial / path.name)
    partial.rename(folder)


def convert(name: str, work: Path) -> dict[str, float]:
    """Write one store.

    Args:
        name: Of STORES, or SCDL.
        work: Folder with `h5ad` and `h5ad_u16`.

    Returns:
        Wall and CPU seconds without the imports, and peak memory of the process.
    """
    out = folder_of(name, work)
    parts = work / "scdl_parts"
    for folder in (out, parts):
        shutil.rmtree(folder, ignore_errors=True)
    if name == SCDL:
        from bionemo.scdl.io.single_cell_collection import SingleCellCollection
    else:
        from annbatch import DatasetCollection
    wall, cpu = time.perf_counter(), time.process_time()
    if name == SCDL:
        collection = SingleCellCollection(str(parts))
        collection.load_h5ad_multi(str(work / "h5ad"), max_workers=1, use_X_not_raw=True)
        collection.flatten(str(out), destroy_on_copy=True)
    else:
        store = STORES[name]
        paths = SourceCells(work / ("h5ad_u16" if store.whole else "h5ad")).paths
        codecs = {"zstd": (BloscCodec(cname="zstd", clevel=1),), "none": ()}
        codec: dict[str, Any] = (
            {"zarr_compressor": codecs[store.codec]} if store.codec in codecs else {}
        )
        DatasetCollection(zarr.open_group(out, mode="w")).add_adatas(
            paths, shuffle=True, n_obs_per_chunk=store.rows, rng=np.random.default_rng(0), **codec
        )
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def normalised(counts: csr_matrix, out: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Return model-ready cells, the fastest way that scipy and numpy allow.

    Only the values are transformed, in float32, and the dense memory is used again.

    Args:
        counts: (B, G) raw counts.
        out: (>= B, G) memory; None for fresh one.
    """
    totals = np.maximum(np.add.reduceat(counts.data, counts.indptr[:-1], dtype=np.float32), 1)
    scale = np.repeat((TARGET_SUM / totals).astype(np.float32), np.diff(counts.indptr))
    values = np.multiply(counts.data, scale, dtype=np.float32)
    np.log1p(values, out=values)
    dense = csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)
    return dense.toarray(out=None if out is None else out[: counts.shape[0]])


def _normalised_torch(counts: Any) -> Any:
    """Return model-ready cells as the documentation shows it: a dense tensor, then transformed."""
    dense = counts.float().to_dense()  # torch has no uint16 to_dense
    return (dense * (TARGET_SUM / dense.sum(dim=1, keepdim=True).clamp(min=1))).log1p_()


class Annbatch:
    """One opened store of annbatch."""

    def __init__(self, path: Path, *, batch: int) -> None:
        """Open the store; nothing but the counts is loaded with the batches.

        Args:
            path: The store.
            batch: Cells of a batch.
        """
        from annbatch import DatasetCollection

        self._collection, self._batch = DatasetCollection(path, mode="r"), batch
        self._parts = [anndata.io.sparse_dataset(group["X"]) for group in self._collection]
        self.n_cells = sum(part.shape[0] for part in self._parts)
        self._dense = np.empty((batch, self._parts[0].shape[1]), np.float32)
        self._cells: NDArray[np.int64] | None = None

    def _loader(self, chunk: int, preload: int, epoch: int, *, ids: bool, torch: bool) -> Any:
        from annbatch import Loader

        loader: Any = Loader(
            batch_size=self._batch,
            chunk_size=chunk,
            preload_nchunks=preload,
            shuffle=True,
            preload_to_gpu=False,
            return_index=ids,
            rng=np.random.default_rng([0, epoch]),
            to="torch" if torch else None,
        )
        return loader.add_datasets(self._parts)

    def _numbers(self) -> NDArray[np.int64]:
        if self._cells is None:
            names = self._collection.obs().index.astype(str)
            self._cells = np.array([int(name.removeprefix("cell")) for name in names])
        return self._cells

    def contender(
        self,
        name: str,
        kind: str,
        arguments: tuple[int, int],
        *,
        torch: bool = False,
        fresh: bool = False,
    ) -> Contender:
        """Return one way to read the store.

        Args:
            name: Name of the store.
            kind: sparse or ready.
            arguments: chunk_size and preload_nchunks.
            torch: Through torch tensors, as documented, instead of scipy.
            fresh: Dense batches in memory of their own, so that they can be kept in a queue.
        """
        out = None if fresh else self._dense

        def batches(epoch: int, ids: bool) -> Iterator[Loaded]:
            for item in self._loader(*arguments, epoch, ids=ids, torch=torch):
                counts = item["X"]
                if kind == "ready":
                    counts = _normalised_torch(counts) if torch else normalised(counts, out)
                cells = self._numbers()[item["index"]] if ids else None
                yield Loaded(counts.shape[0], counts, cells)

        way = f"{arguments[0]}x{arguments[1]}{' torch' if torch else ''}{' fresh' if fresh else ''}"
        return Contender(name, kind, self.n_cells, batches, way, kind == "sparse" or torch or fresh)


def scdl_contender(path: Path, *, batch: int) -> Contender:
    """Return bionemo-scdl's own loader: torch's DataLoader, shuffled, without workers.

    Args:
        path: The store.
        batch: Cells of a batch.
    """
    import torch
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

    torch.set_num_threads(1)
    dataset = SingleCellMemMapDataset(str(path))

    def batches(epoch: int, ids: bool) -> Iterator[Loaded]:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(dataset), generator=generator).tolist()
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=batch,
            sampler=order,
            collate_fn=collate_sparse_matrix_batch,
        )
        for number, counts in enumerate(loader):
            cells = np.array(order[number * batch : (number + 1) * batch]) if ids else None
            yield Loaded(counts.shape[0], counts, cells)

    return Contender(SCDL, "sparse", len(dataset), batches)


class _Cells:
    """Counts and numbers of cells, cut into batches together."""

    def __init__(self, counts: csr_matrix, cells: NDArray[np.int64]) -> None:
        self.counts, self.cells = counts, cells

    def __getitem__(self, rows: Any) -> _Cells:
        return _Cells(self.counts[rows], self.cells[rows])


class _H5adFiles:
    """The cells of h5ad files by number, read from disk; what scDataset is given."""

    def __init__(self, source: SourceCells) -> None:
        self._starts, self._n_cells = source.starts, source.n_cells
        self._parts = [anndata.io.sparse_dataset(h5py.File(path)["X"]) for path in source.paths]

    def __len__(self) -> int:
        return self._n_cells

    def __getitem__(self, cells: Any) -> _Cells:
        wanted = np.asarray(cells)
        files = np.searchsorted(self._starts, wanted, side="right") - 1
        cuts = np.flatnonzero(np.diff(files, prepend=-1, append=-1))
        parts = [
            self._parts[files[a]][wanted[a:b] - self._starts[files[a]]] for a, b in pairwise(cuts)
        ]
        return _Cells(csr_matrix(vstack(parts, format="csr")), wanted)


def scdataset_contender(
    source: SourceCells, kind: str, *, block: int, batch: int, workers: int = 0
) -> Contender:
    """Return scDataset on the h5ad files, which it sorts each fetch of to read them in order.

    Args:
        source: The files.
        kind: sparse or ready.
        block: Rows that it reads in one piece.
        batch: Cells of a batch.
        workers: Processes of torch's DataLoader; 0: none.
    """
    import torch
    from scdataset import BlockShuffling, scDataset

    torch.set_num_threads(1)
    files = _H5adFiles(source)

    def whole(batch_of_cells: _Cells) -> _Cells:
        return batch_of_cells

    def batches(epoch: int, ids: bool) -> Iterator[Loaded]:
        dataset = scDataset(
            files, BlockShuffling(block_size=block), batch_size=batch,
            fetch_factor=FETCH_FACTOR, seed=epoch,
        )  # fmt: skip
        for found in torch.utils.data.DataLoader(
            dataset, batch_size=None, collate_fn=whole, num_workers=workers
        ):
            counts = normalised(found.counts, None) if kind == "ready" else found.counts
            yield Loaded(counts.shape[0], counts, found.cells if ids else None)

    way = f"blocks of {block}" + (f", {workers} workers" if workers else "")
    return Contender(SCDATASET, kind, source.n_cells, batches, way)


def contenders(work: Path, *, batch: int) -> list[Contender]:
    """Return all ways to read the stores of a work folder.

    Args:
        work: Folder of the stores.
        batch: Cells of a batch.
    """
    warnings.filterwarnings("ignore", module="zarr|annbatch|anndata")
    use_zarrs()
    found = []
    for name in STORES:
        store = Annbatch(folder_of(name, work), batch=batch)
        for kind in ("sparse", "ready"):
            found += [store.contender(name, kind, way) for way in ARGUMENTS]
        found += [store.contender(name, "ready", way, fresh=True) for way in ARGUMENTS[1:]]
        if find_spec("torch"):
            import torch

            torch.set_num_threads(1)
            if STORES[name] in (AnnbatchStore(whole=False), AnnbatchStore(whole=True)):
                found.append(store.contender(name, "ready", ARGUMENTS[1], torch=True))
    if find_spec("scdataset"):
        source = SourceCells(work / "h5ad")
        found += [
            scdataset_contender(source, kind, block=block, batch=batch)
            for kind in ("sparse", "ready")
            for block in BLOCKS
        ]
    if find_spec("bionemo") and folder_of(SCDL, work).exists():
        found.append(scdl_contender(folder_of(SCDL, work), batch=batch))
    return found


def contenders_ahead(work: Path, *, batch: int) -> list[Contender]:
    """Return the ways that use all cores, with what a user adds to have batches made ahead.

    Args:
        work: Folder of the stores.
        batch: Cells of a batch.
    """
    found = []
    for name in (LZ4, PLAIN):
        store = Annbatch(folder_of(name, work), batch=batch)
        for kind in ("sparse", "ready"):
            one = store.contender(name, kind, ARGUMENTS[1], fresh=True)
            found.append(replace(
                one, settings=f"{one.settings}, user thread",
                batches=lambda epoch, ids, one=one: read_ahead(one.batches(epoch, ids), QUEUE),
            ))  # fmt: skip
    if find_spec("scdataset"):
        source = SourceCells(work / "h5ad")
        found += [
            scdataset_contender(source, kind, block=BLOCKS[-1], batch=batch, workers=2)
            for kind in ("sparse", "ready")
        ]
    return found


def read_ahead(batches: Iterator[Loaded], size: int) -> Iterator[Loaded]:
    """Yield batches that a thread has put into a queue: what a user can add in ten lines.

    Args:
        batches: The loader's; each batch must own its memory.
        size: Batches kept ready.
    """
    ready: queue.Queue[Loaded | None] = queue.Queue(size)

    def fill() -> None:
        for batch in batches:
            ready.put(batch)
        ready.put(None)

    threading.Thread(target=fill, daemon=True).start()
    yield from iter(ready.get, None)


def main() -> int:
    """Convert one store."""
    name = sys.argv[1]
    warnings.filterwarnings("ignore")
    use_zarrs()
    if name == "list":
        names = [*STORES, *([SCDL] if find_spec("bionemo") else [])]
        print(json.dumps({name: folder_of(name, Path()).name for name in names}))
    elif name == "u16":
        work = Path(sys.argv[2])
        write_whole(SourceCells(work / "h5ad"), work / "h5ad_u16")
    else:
        print(json.dumps(convert(name, Path(sys.argv[2]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
