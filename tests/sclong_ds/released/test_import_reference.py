"""`import-reference`: the released numbers come out, and what does not fit is refused whole.

Covers also `sclong_ds/released/arguments.py`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from goldens import FOLDER
from scipy.sparse import csr_matrix

from benchmarks import import_memory
from sclong_ds import __main__ as command_line
from sclong_ds.corpus.gene_graph import read_gene_graph, write_gene_graph
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.exported.model_dir import load_model
from sclong_ds.released.import_reference import with_ensembl_ids

GOLDEN = np.load(FOLDER / "dev_a.npz", allow_pickle=False)
ARGUMENTS = json.loads((FOLDER / "dev_a.json").read_text())["constructor_kwargs"]
N_GENES = 64
# Measured between the released code in float32 and float64, with a margin of ten.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
BIG_RATIO = 1.3
"""Largest peak memory of an import over the size of its weights in float32."""

State = OrderedDict[str, torch.Tensor]


def released_state() -> State:
    names = [name for name in GOLDEN.files if name.startswith("sd/")]
    return OrderedDict((name[3:], torch.from_numpy(GOLDEN[name])) for name in names)


def constructor_arguments() -> dict[str, Any]:
    graph = {key: torch.from_numpy(GOLDEN[key]) for key in ("G_go", "G_go_weight")}
    return ARGUMENTS | graph | {"device": torch.device("cpu"), "gene2vec_file": "gene2vec.npy"}


def symbols() -> list[str]:
    """Return 62 current symbols of the bundled table, an old one and a name of nothing."""
    bundled = GeneVocabulary.bundled()
    named = [s for s, gene in zip(bundled.symbols, bundled.ids, strict=True) if s != gene]
    return [*named[: N_GENES - 2], "P53", "NoSuchGene"]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with the three files."""
    folder = tmp_path / "in"
    folder.mkdir()
    checkpoint = {
        "epoch": 3,
        "losses": np.float64(0.5),
        "model_state_dict": released_state(),
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": []},
        "scheduler_state_dict": {"base_lrs": [1e-6], "max_lrs": np.array([5e-5])},
    }
    torch.save(checkpoint, folder / "m.pth")
    (folder / "h.pkl").write_bytes(pickle.dumps(constructor_arguments()))
    (folder / "genes.txt").write_text("\n".join(symbols()) + "\n")
    return folder


def run(folder: Path, *more: object) -> int:
    paths = ["--checkpoint", "m.pth", "--hyper-params", "h.pkl", "--genes", "genes.txt"]
    paths = [p if p.startswith("--") else str(folder / p) for p in paths]
    out = folder.parent / "out" / "model"
    return command_line.main(["import-reference", *paths, "--out", str(out), *map(str, more)])


def predictions(model_dir: Path) -> torch.Tensor:
    # The last position is the released code's pad token, which our model adds itself.
    x = torch.from_numpy(GOLDEN["b1/x"])[:, :N_GENES]
    with torch.no_grad():
        return load_model(model_dir)(x, x <= ARGUMENTS["mask_token_thres"])


EXPECTED = torch.from_numpy(GOLDEN["b1/exp_out"])[:, :N_GENES, 0]


def test_the_imported_model_gives_the_released_numbers(inputs: Path) -> None:
    assert run(inputs) == 0
    out = inputs.parent / "out" / "model"
    torch.testing.assert_close(predictions(out), EXPECTED, **TOLERANCE)
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["imported_files"]["checkpoint"]["bytes"] == (inputs / "m.pth").stat().st_size
    assert provenance["checkpoint"] == {"epoch": 3, "losses": 0.5}
    assert provenance["rounded_to_float32"] == {"pos_emb.emb.weight": "float64"}
    assert provenance["target_sum"] == load_model(out).transform.target_sum == 1.0e4
    assert "did not train it" in (out / "README.md").read_text()


def as_ddp(folder: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in released_state().items()}
    torch.save({"model_state_dict": state}, folder / "m.pth")


def as_bare_state(folder: Path) -> None:
    torch.save(released_state(), folder / "m.pth")


def as_older_format(folder: Path) -> None:
    torch.save(released_state(), folder / "m.pth", _use_new_zipfile_serialization=False)


def as_torch_saved_arguments(folder: Path) -> None:
    torch.save(constructor_arguments(), folder / "h.pkl")


def as_numpy_arguments(folder: Path) -> None:
    given = constructor_arguments() | {"base_dim": np.int64(24), "device": "cuda:0"}
    given |= {key: given[key].numpy() for key in ("G_go", "G_go_weight")}
    (folder / "h.pkl").write_bytes(pickle.dumps(given))


@pytest.mark.parametrize(
    "variant",
    [as_ddp, as_bare_state, as_older_format, as_torch_saved_arguments, as_numpy_arguments],
)
def test_other_ways_to_save_it(inputs: Path, variant: Callable[[Path], None]) -> None:
    variant(inputs)
    assert run(inputs, "--target-sum", "1e6") == 0
    out = inputs.parent / "out" / "model"
    torch.testing.assert_close(predictions(out), EXPECTED, **TOLERANCE)
    assert load_model(out).transform.target_sum == 1.0e6


def change_state(folder: Path, change: Callable[[State], object]) -> None:
    state = released_state()
    change(state)
    torch.save({"model_state_dict": state}, folder / "m.pth")


def change_arguments(folder: Path, **changes: object) -> None:
    given = {k: v for k, v in (constructor_arguments() | changes).items() if v != "absent"}
    (folder / "h.pkl").write_bytes(pickle.dumps(given))


def save_with_object(folder: Path) -> None:
    content = {"model_state_dict": released_state(), "args": argparse.Namespace(lr=1)}
    torch.save(content, folder / "m.pth")


def cut(folder: Path) -> None:
    whole = (folder / "m.pth").read_bytes()
    (folder / "m.pth").write_bytes(whole[: len(whole) // 2])


def with_nan(state: State) -> None:
    state["large_encoder.net.layers.1.0.fn.to_k.weight"][3, 5] = torch.nan


K = "large_encoder.net.layers.1.0.fn.to_k.weight"
P = "decoder.net.layers.0.0.fn.fast_attention.projection_matrix"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "m.pth: the file is incomplete"),
    "object": (save_with_object, "m.pth: argparse.Namespace is not allowed"),
    "no state": (lambda f: torch.save({"epoch": 1}, f / "m.pth"), "neither a state dict .*epoch"),
    "missing": (lambda f: change_state(f, lambda s: s.pop(K)), f"m.pth: .* has no {K}"),
    "no features": (lambda f: change_state(f, lambda s: s.pop(P)), f"m.pth: .* has no {P}"),
    "extra": (
        lambda f: change_state(f, lambda s: s.update(cls_token=torch.ones(2))),
        "m.pth: cls_token .* is no weight",
    ),
    "shape": (
        lambda f: change_state(f, lambda s: s.update({K: torch.ones(63, 64)})),
        rf"m.pth: {K} has the shape \(63, 64\), must be \(64, 64\)",
    ),
    "feature shape": (
        lambda f: change_state(f, lambda s: s.update({P: torch.ones(20)})),
        rf"m.pth: {P} has the shape \(20,\)",
    ),
    **{
        f"type {kind}": (
            lambda f, kind=kind: change_state(f, lambda s: s.update({K: s[K].to(kind)})),
            f"m.pth: {K} is {str(kind).removeprefix('torch.')}, must be floating-point",
        )
        for kind in (torch.complex64, torch.int32, torch.bool)
    },
    "feature type": (
        lambda f: change_state(f, lambda s: s.update({P: s[P].to(torch.complex64)})),
        f"m.pth: {P} is complex64, must be floating-point",
    ),
    **{
        kind: (
            lambda f, make=make: change_state(f, lambda s: s.update({K: make(s[K])})),
            rf"m.pth: torch\.{function} is not allowed: only dense tensors .*met at {K}",
        )
        for kind, make, function in (
            (
                "quantized",
                lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
                r"QInt8Storage|_utils\._rebuild_qtensor",
            ),
            ("sparse", torch.Tensor.to_sparse, r"_utils\._rebuild_sparse_tensor"),
            (
                "nested",
                lambda w: torch._nested_view_from_buffer(
                    w.reshape(-1), *(torch.tensor([n]) for n in ([64, 64], [64, 1], 0))
                ),
                r"_utils\._rebuild_nested_tensor",
            ),
        )
    },
    "nan": (lambda f: change_state(f, with_nan), f"{K} holds values that are not finite"),
    "other model": (
        lambda f: torch.save({"w": torch.ones(2)}, f / "m.pth"),
        "not that of a released scLong model",
    ),
    "depth": (lambda f: change_arguments(f, large_enc_depth=42), "large_enc_depth is 42, .* 2"),
    "heads": (lambda f: change_arguments(f, dec_heads=8), "dec_heads is 8, the weights have 3"),
    "features": (
        lambda f: change_arguments(f, nb_features=None),
        "nb_features is .*, the weights have 20",
    ),
    "bias": (lambda f: change_arguments(f, qkv_bias=False), "qkv_bias is False, .* True"),
    "tokens": (lambda f: change_arguments(f, max_seq_len=27875), "max_seq_len is 27875, .* 65"),
    "go": (lambda f: change_arguments(f, go_num_layers=2), "go_num_layers is 2, .* 1"),
    "mask": (lambda f: change_arguments(f, mask_token_thres=0), "mask_token_thres is 0"),
    "no top": (lambda f: change_arguments(f, top_seq_len="absent"), "top_seq_len is None"),
    "long top": (lambda f: change_arguments(f, top_seq_len=64), "top_seq_len: got 64, .* 64"),
    "no graph": (lambda f: change_arguments(f, G_go="absent"), "no G_go .* --gene-graph"),
    "pad in graph": (
        lambda f: change_arguments(f, G_go=torch.tensor([[64], [0]]), G_go_weight=torch.ones(1)),
        r"h.pkl: G_go, G_go_weight: edges name genes outside 0\.\.63",
    ),
    "arguments": (lambda f: (f / "h.pkl").write_bytes(pickle.dumps([1])), "h.pkl: holds list"),
    "namespace": (
        lambda f: (f / "h.pkl").write_bytes(pickle.dumps(argparse.Namespace())),
        "h.pkl: argparse.Namespace is not allowed",
    ),
    "genes": (
        lambda f: (f / "genes.txt").write_text("\n".join(symbols()[1:])),
        "64 genes and a pad token; --genes lists 63",
    ),
    "no genes": (lambda f: (f / "genes.txt").unlink(), "genes.txt: no such file"),
}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    inputs: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, reason = REFUSED[case]
    spoil(inputs)
    assert run(inputs) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(reason, lines[0]), lines[0]
    assert "Traceback" not in printed.err
    out = inputs.parent / "out"
    assert not out.exists() or not list(out.iterdir())


def test_an_existing_folder_is_kept(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (inputs.parent / "out" / "model").mkdir(parents=True)
    assert run(inputs) == 1
    assert "exists: name another folder" in capsys.readouterr().err


def test_a_given_graph_takes_the_place_of_the_pickled_one(inputs: Path) -> None:
    change_arguments(inputs, G_go="absent", G_go_weight="absent")
    listed = GeneVocabulary.read(inputs / "genes.txt")
    about: Any = {"n_genes": N_GENES, "genes_hash": listed.hash, "settings": {}, "counts": {}}
    edges, weights = GOLDEN["G_go"], GOLDEN["G_go_weight"]
    write_gene_graph(inputs / "graph.npz", edges, weights, **about)
    assert run(inputs, "--gene-graph", inputs / "graph.npz") == 0
    out = inputs.parent / "out" / "model"
    torch.testing.assert_close(predictions(out), EXPECTED, **TOLERANCE)
    found, _ = read_gene_graph(out / "gene_graph.npz", genes_hash=load_model(out).genes.hash)
    assert set(map(tuple, found.T)) == set(map(tuple, edges.T))


def test_symbols_become_ensembl_ids_where_that_is_safe() -> None:
    names = ("TP53", "P53", "TNMD", "ENSG00000000419.14", "ENSG00000000457", "NoSuchGene", "KRAS2")
    listed = GeneVocabulary(names, names, ("unknown",) * len(names))
    genes, mapped = with_ensembl_ids(listed)
    assert genes.ids == (
        "ENSG00000141510",
        "P53",  # would be TP53 again
        "ENSG00000000005",
        "ENSG00000000419",
        "ENSG00000000457",
        "NoSuchGene",
        GeneVocabulary.bundled().ids[GeneVocabulary.bundled().symbols.index("KRAS")],
    )
    assert genes.symbols[-1] == "KRAS"
    assert genes.classes[0] == "protein_coding"
    assert mapped == {
        "ensembl_id": 1, "ensembl_id_with_version": 1, "symbol": 2, "alias": 1, "unmapped": 2
    }  # fmt: skip


def test_two_versions_of_a_gene_keep_their_names() -> None:
    names = ("ENSG00000000419.14", "ENSG00000000419.15", "DPM1")
    genes, _ = with_ensembl_ids(GeneVocabulary(names, names, ("unknown",) * 3))
    assert genes.ids == (*names[:2], "ENSG00000000419")


def test_a_gene_table_is_kept_as_it_is() -> None:
    table = GeneVocabulary(("ENSG00000000419",), ("old",), ("non_coding",))
    assert with_ensembl_ids(table)[0] is table


@pytest.mark.parametrize("named_by", ["symbols", "ids"])
def test_cells_are_embedded_by_an_imported_model(inputs: Path, named_by: str) -> None:
    assert run(inputs) == 0
    out = inputs.parent / "out" / "model"
    genes = load_model(out).genes
    order = np.random.default_rng(0).permutation(N_GENES)
    names = [getattr(genes, named_by)[i] for i in order]
    counts = csr_matrix(np.random.default_rng(1).poisson(1.0, (5, N_GENES)).astype(np.float32))
    anndata.AnnData(counts, var=pd.DataFrame(index=names)).write_h5ad(inputs / "cells.h5ad")
    paths = [out, inputs / "cells.h5ad", "--out", inputs / "embedded.h5ad"]
    options = ["--min-genes-mapped", 10, "--device", "cpu"]
    assert command_line.main(["embed", *map(str, paths + options)]) == 0
    result = anndata.read_h5ad(inputs / "embedded.h5ad")
    assert result.obsm["X_sclong"].shape == (5, 24)
    assert np.isfinite(result.obsm["X_sclong"]).all()
    np.testing.assert_array_equal(result.X.toarray()[:, order], counts.toarray())


@pytest.mark.distributed
def test_an_import_of_the_published_size_stays_near_the_size_of_its_weights(
    tmp_path: Path,
) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < import_memory.DISK_BYTES:
        pytest.skip(f"{tmp_path}: {free:,} bytes free, {import_memory.DISK_BYTES:,} needed")
    try:
        inputs = import_memory.write_inputs(tmp_path)
        peak = import_memory.measure(inputs, tmp_path / "model")
        assert peak.weight_bytes == 4 * 1_006_086_461
        assert peak.ratio < BIG_RATIO
        model = load_model(tmp_path / "model")
        published = json.loads(import_memory.SHAPES.read_text())["state_dict"]
        position = list(published).index("large_encoder.net.layers.41.1.fn.fn.w2.weight")
        weight = model.large_encoder.layers[41].feed_forward[2].weight
        assert weight[0, 0] == position + 1
        assert weight.count_nonzero() == 1
        assert sum(p.numel() for p in model.parameters()) == 1_006_086_461
    finally:
        # pytest keeps the folders of three runs.
        shutil.rmtree(tmp_path)
