"""`embed`: order, pooling, independence of batches, harmonisation, refusals.

Covers also `sclong_ds/embedding/cells.py`, `sclong_ds/embedding/embed_arguments.py`,
`sclong_ds/embedding/opening.py`, `sclong_ds/embedding/record.py`, `sclong_ds/embedding/stored.py`,
`sclong_ds/model/counts_input.py`.
"""

import argparse
import gzip
import logging
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from exported import named_genes, write_model
from scipy.sparse import csr_matrix

from data_prep.convert.convert import prepare_corpus
from data_prep.convert.one_dataset import convert_dataset
from data_prep.convert.source_identity import source_hash
from data_prep.corpus.finalize import finalize
from data_prep.genes.gene_names import GeneResolver
from data_prep.manifest.manifest import Dataset
from data_prep.staging.settings import Settings
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding import cells as input_cells
from sclong_ds.embedding import embed, embed_arguments, opening, stored
from sclong_ds.exported.manifest import model_digest
from sclong_ds.exported.model_dir import load_model
from sclong_ds.objective.measured import MeasuredGenes

N_GENES, N_CELLS = 60, 23


@pytest.fixture(scope="module")
def genes() -> GeneVocabulary:
    return named_genes(N_GENES)


@pytest.fixture(scope="module")
def model_dir(genes: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), genes, seed=0)


@pytest.fixture(scope="module")
def counts() -> csr_matrix:
    """Counts of 23 cells; cell 5 has none."""
    rng = np.random.default_rng(0)
    dense = rng.poisson(1.0, (N_CELLS, N_GENES))
    dense[5] = 0
    return csr_matrix(dense)


@pytest.fixture
def h5ad(counts: csr_matrix, genes: GeneVocabulary, tmp_path: Path) -> Path:
    """The cells with shuffled genes named by symbol, and one unknown gene."""
    order = np.random.default_rng(1).permutation(N_GENES)
    unknown = np.full((N_CELLS, 1), 2)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.where(np.arange(N_CELLS) % 2, "B", "T")),
            "score": np.linspace(0, 1, N_CELLS),
        },
        index=[f"cell{i}" for i in reversed(range(N_CELLS))],
    )
    var = pd.DataFrame(index=[genes.symbols[i] for i in order] + ["NoSuchGene"])
    shuffled = csr_matrix(np.hstack([counts.toarray()[:, order], unknown]).astype(np.float32))
    anndata.AnnData(shuffled, obs=obs, var=var).write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def run(*arguments: object, min_genes: int = 10) -> int:
    parser = argparse.ArgumentParser()
    embed_arguments.add_arguments(parser)
    given = [str(argument) for argument in arguments]
    return embed.run(parser.parse_args([*given, "--min-genes-mapped", str(min_genes)]))


def test_output_has_the_cells_of_the_input_in_order(
    model_dir: Path, h5ad: Path, counts: csr_matrix, genes: GeneVocabulary, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out.h5ad"
    assert run(model_dir, h5ad, "--out", out, "--device", "cpu") == 0
    source, result = anndata.read_h5ad(h5ad), anndata.read_h5ad(out)
    assert list(result.obs_names) == list(source.obs_names)
    assert list(result.var_names) == list(genes.ids)
    assert list(result.obs["cell_type"]) == list(source.obs["cell_type"])
    np.testing.assert_array_equal(result.obs["score"], source.obs["score"])
    np.testing.assert_array_equal(result.X.toarray(), counts.toarray())
    np.testing.assert_array_equal(result.obs["n_genes_mapped"], np.diff(counts.indptr))
    np.testing.assert_array_equal(result.obs["n_counts_mapped"], np.ravel(counts.sum(axis=1)))
    record = result.uns["sclong"]
    assert record["model_digest"] == model_digest(model_dir)
    assert record["input"] == str(h5ad)
    assert record["input_hash"] == source_hash(h5ad)
    assert record["options"]["min_genes_mapped"] == "10"
    assert record["genes_hash"] == genes.hash
    assert record["transform"]["target_sum"] == 1.0e4
    assert record["coverage"]["n_genes_mapped"] == N_GENES
    assert record["coverage"]["n_genes_input"] == N_GENES + 1
    assert record["coverage"]["n_cells_without_counts"] == 1
    assert record["coverage"]["counts_kept"] == counts.sum() / (counts.sum() + 2 * N_CELLS)
    assert not list(out.parent.glob(".*"))


def test_embedding_is_the_mean_over_expressed_genes(
    model_dir: Path, h5ad: Path, counts: csr_matrix, tmp_path: Path
) -> None:
    run(model_dir, h5ad, "--out", tmp_path / "out.h5ad", "--device", "cpu")
    embedded = anndata.read_h5ad(tmp_path / "out.h5ad").obsm[embed.KEY]
    assert embedded.dtype == np.float32
    model = load_model(model_dir)
    with torch.no_grad():
        vectors = model.encode(
            torch.from_numpy(log1p_normalise(counts, target_sum=1.0e4)), genes="all"
        ).numpy()
    for cell in (0, 7, N_CELLS - 1):
        expected = vectors[cell][counts[cell].indices].mean(axis=0)
        np.testing.assert_allclose(embedded[cell], expected, rtol=1e-4, atol=1e-5)


def test_cell_without_counts_is_kept_as_zeros_and_reported(
    model_dir: Path, h5ad: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(model_dir, h5ad, "--out", tmp_path / "out.h5ad", "--device", "cpu")
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert not result.obsm[embed.KEY][5].any()
    assert np.delete(result.obsm[embed.KEY], 5, axis=0).any(axis=1).all()
    assert np.isfinite(result.obsm[embed.KEY]).all()
    assert "1 of 23 cells" in caplog.text


def test_batch_size_and_batch_mates_do_not_matter(model_dir: Path, counts: csr_matrix) -> None:
    model = load_model(model_dir)
    alone = embed.embed_counts(model, counts, batch_size=1)
    scale = np.abs(alone).max()
    for batch_size in (4, N_CELLS):
        together = embed.embed_counts(model, counts, batch_size=batch_size)
        assert np.abs(together - alone).max() <= 1e-5 * scale
    backwards = embed.embed_counts(model, counts[::-1], batch_size=4)[::-1]
    assert np.abs(backwards - alone).max() <= 1e-5 * scale
    assert np.abs(alone[0] - alone[1]).max() > 1e-3 * scale


@pytest.mark.thorough
def test_formats_and_blocks_give_the_same_embedding(
    model_dir: Path,
    h5ad: Path,
    counts: csr_matrix,
    genes: GeneVocabulary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = pd.DataFrame(counts.toarray(), columns=list(genes.ids))
    table.index = [f"cell{i}" for i in range(N_CELLS)]
    with gzip.open(tmp_path / "cells.csv.gz", "wt") as file:
        table.to_csv(file)
    run(model_dir, h5ad, "--out", tmp_path / "a.h5ad", "--device", "cpu")
    run(model_dir, tmp_path / "cells.csv.gz", "--out", tmp_path / "b.h5ad", "--device", "cpu")
    monkeypatch.setattr("data_prep.source.source.BLOCK_ENTRIES", 100)
    run(model_dir, h5ad, "--out", tmp_path / "c.h5ad", "--device", "cpu", "--batch-size", "3")
    a, b, c = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in "abc")
    for other in (b, c):
        np.testing.assert_array_equal(other.X.toarray(), a.X.toarray())
        np.testing.assert_allclose(other.obsm[embed.KEY], a.obsm[embed.KEY], rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_output_can_be_embedded_again(model_dir: Path, h5ad: Path, tmp_path: Path) -> None:
    run(model_dir, h5ad, "--out", tmp_path / "once.h5ad", "--device", "cpu")
    run(model_dir, tmp_path / "once.h5ad", "--out", tmp_path / "twice.h5ad", "--device", "cpu")
    once, twice = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("once", "twice"))
    np.testing.assert_array_equal(once.obsm[embed.KEY], twice.obsm[embed.KEY])
    assert list(once.obs.columns) == list(twice.obs.columns)
    assert twice.uns["sclong"]["coverage"]["counts_kept"] == 1.0


def test_no_counts_leaves_x_out(model_dir: Path, h5ad: Path, tmp_path: Path) -> None:
    run(model_dir, h5ad, "--out", tmp_path / "out.h5ad", "--no-counts", "--device", "cpu")
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert result.X is None
    assert result.shape == (N_CELLS, N_GENES)
    assert result.obsm[embed.KEY].shape == (N_CELLS, 8)


@pytest.fixture
def corpus(h5ad: Path, genes: GeneVocabulary, tmp_path: Path) -> Path:
    """The cells (but the empty one) as a corpus with a validation split."""
    folder = tmp_path / "corpus"
    settings = Settings(genes_hash=genes.hash, min_genes_mapped=10)
    prepare_corpus(folder, genes=genes, settings=settings)
    dataset = Dataset(dataset_id="tiny", path=h5ad, obs_columns="cell_type")
    resolver = GeneResolver(genes)
    entry = convert_dataset(dataset, corpus=folder, settings=settings, resolver=resolver)
    assert entry["status"] == "ok", entry["reason"]
    finalize(folder, validation_fraction=0.3, split_by="cell")
    return folder


@pytest.mark.thorough
def test_corpus_and_its_splits(
    model_dir: Path, corpus: Path, h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_cells, "BLOCK_CELLS", 4)
    run(model_dir, h5ad, "--out", tmp_path / "file.h5ad", "--device", "cpu")
    run(model_dir, corpus, "--out", tmp_path / "all.h5ad", "--device", "cpu")
    held_out = tmp_path / "validation.h5ad"
    run(model_dir, corpus, "--out", held_out, "--split", "validation", "--device", "cpu")
    names = ("file", "all", "validation")
    source, everything, validation = (
        anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in names
    )
    opened = Corpus(corpus)
    assert everything.n_obs == len(opened) == N_CELLS - 1
    np.testing.assert_array_equal(everything.X.toarray(), opened.rows(range(len(opened))).toarray())
    rows = source.obs_names.get_indexer(everything.obs["barcode"])
    np.testing.assert_allclose(
        everything.obsm[embed.KEY], source.obsm[embed.KEY][rows], rtol=1e-4, atol=1e-5
    )
    assert list(everything.obs["cell_type"]) == list(source.obs["cell_type"].iloc[rows])
    split = opened.split("validation")
    assert 0 < len(split) < len(opened)
    assert list(validation.obs_names) == [str(row) for row in split]
    np.testing.assert_allclose(
        validation.obsm[embed.KEY], everything.obsm[embed.KEY][split], rtol=1e-4, atol=1e-5
    )


@pytest.mark.thorough
def test_refuses_an_unknown_split_and_a_corpus_of_other_genes(
    model_dir: Path, corpus: Path, genes: GeneVocabulary
) -> None:
    with pytest.raises(ValueError, match="this corpus has"):
        input_cells.open_cells(corpus, genes=genes, split="night")
    fewer = GeneVocabulary(genes.ids[1:], genes.symbols[1:], genes.classes[1:])
    with pytest.raises(ValueError, match="other genes"):
        input_cells.open_cells(corpus, genes=fewer)
    (corpus / "corpus.json").unlink()
    with pytest.raises(FileNotFoundError, match="not finalized"):
        input_cells.open_cells(corpus, genes=genes)


def test_text_columns_of_mixed_types_become_categories() -> None:
    table = pd.DataFrame({"mixed": ["a", 1, None], "number": [1.5, 2.0, 3.0]})
    plain = embed.plain_columns(table)
    assert plain["mixed"].cat.categories.tolist() == ["1", "a"]
    assert plain["mixed"].isna().tolist() == [False, False, True]
    assert plain["number"].dtype == np.float64


@pytest.fixture
def broken_late(genes: GeneVocabulary, tmp_path: Path) -> Path:
    """Counts in the first block, a fraction in the last cell."""
    dense = np.ones((40, N_GENES), dtype=np.float32)
    dense[-1, 0] = 0.5
    cells = anndata.AnnData(csr_matrix(dense), var=pd.DataFrame(index=list(genes.ids)))
    cells.write_h5ad(tmp_path / "late.h5ad")
    return tmp_path / "late.h5ad"


def test_error_while_reading_leaves_the_old_output(
    model_dir: Path, broken_late: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.source.source.BLOCK_CELLS", 10)
    out = tmp_path / "out" / "out.h5ad"
    out.parent.mkdir()
    out.write_bytes(b"old")
    with pytest.raises(ValueError, match="not counts"):
        run(model_dir, broken_late, "--out", out, "--device", "cpu")
    assert out.read_bytes() == b"old"
    assert [file.name for file in out.parent.iterdir()] == ["out.h5ad"]


def test_refuses_an_output_over_the_input_or_of_another_type(
    model_dir: Path, h5ad: Path, tmp_path: Path
) -> None:
    before = h5ad.read_bytes()
    with pytest.raises(ValueError, match="write over the input"):
        run(model_dir, h5ad, "--out", h5ad.parent / "." / h5ad.name)
    with pytest.raises(ValueError, match="write over the input"):
        run(model_dir, tmp_path, "--out", tmp_path / "inside.h5ad")
    with pytest.raises(ValueError, match=r"must end in \.h5ad"):
        run(model_dir, h5ad, "--out", tmp_path / "out.csv")
    assert h5ad.read_bytes() == before


def test_refuses_low_coverage_and_values_that_are_not_counts(
    model_dir: Path, h5ad: Path, genes: GeneVocabulary, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="only 60 of 61 genes"):
        run(model_dir, h5ad, "--out", tmp_path / "out.h5ad", min_genes=61)
    scaled = np.random.default_rng(0).normal(size=(5, N_GENES)).astype(np.float32)
    var = pd.DataFrame(index=list(genes.ids))
    anndata.AnnData(scaled, var=var).write_h5ad(tmp_path / "scaled.h5ad")
    with pytest.raises(ValueError, match="scaled"):
        run(model_dir, tmp_path / "scaled.h5ad", "--out", tmp_path / "out.h5ad")
    estimated = np.random.default_rng(0).gamma(2.0, 3.0, (5, N_GENES)).astype(np.float32)
    anndata.AnnData(estimated, var=var).write_h5ad(tmp_path / "estimated.h5ad")
    with pytest.raises(ValueError, match=r"counts = round:X \(--counts\)"):
        run(model_dir, tmp_path / "estimated.h5ad", "--out", tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()


def test_refuses_what_is_not_there(model_dir: Path, h5ad: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        run(model_dir, tmp_path / "absent.h5ad", "--out", tmp_path / "out.h5ad")
    with pytest.raises(FileNotFoundError, match="no exported model"):
        run(tmp_path, h5ad, "--out", tmp_path / "out.h5ad")
    with pytest.raises(ValueError, match="no corpus"):
        run(model_dir, h5ad, "--out", tmp_path / "out.h5ad", "--split", "validation")


@pytest.mark.thorough
def test_thresholds_leave_cells_out_and_say_so(
    model_dir: Path, h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.h5ad"
    run(model_dir, h5ad, "--out", out, "--device", "cpu")
    everything = anndata.read_h5ad(out)
    # Without a threshold every cell has its row, the one without counts too.
    assert everything.n_obs == N_CELLS
    assert dict(everything.uns["sclong"]["cells_left_out"]) == {}
    n_genes = everything.obs["n_genes_mapped"].to_numpy()
    least = int(np.median(n_genes)) + 1
    run(model_dir, h5ad, "--out", out, "--device", "cpu", "--min-genes", least)
    some = anndata.read_h5ad(out)
    kept = n_genes >= least
    assert list(some.obs_names) == list(everything.obs_names[kept])
    np.testing.assert_array_equal(some.X.toarray(), everything.X.toarray()[kept])
    np.testing.assert_allclose(
        some.obsm[embed.KEY], everything.obsm[embed.KEY][kept], rtol=1e-4, atol=1e-5
    )
    record = some.uns["sclong"]
    empty, few = int((n_genes == 0).sum()), int(((n_genes > 0) & ~kept).sum())
    assert dict(record["cells_left_out"]) == {"without counts": empty, "below min_genes": few}
    assert record["read"]["options"] == {"--min-genes": str(least)}
    assert f"cells left out: {empty} without counts, {few} below" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"cells\.h5ad: no cell is left"):
        run(model_dir, h5ad, "--out", out, "--device", "cpu", "--min-counts", 10**9)


@pytest.mark.thorough
def test_the_options_of_a_manifest_say_how_to_read(
    model_dir: Path, h5ad: Path, genes: GeneVocabulary, tmp_path: Path
) -> None:
    source = anndata.read_h5ad(h5ad)
    counts = source.X.toarray()
    source.layers["spliced"] = csr_matrix(counts // 2)
    source.layers["unspliced"] = csr_matrix(counts - counts // 2)
    source.layers["corrected"] = csr_matrix(counts * np.float32(0.97))
    source.X = csr_matrix(np.log1p(counts / np.float32(7)))
    path, out = tmp_path / "parts.h5ad", tmp_path / "out.h5ad"
    source.write_h5ad(path)
    with pytest.raises(ValueError, match=r"parts\.h5ad: no raw counts: .*spliced\+layers/un"):
        run(model_dir, path, "--out", out)
    both = "layers/spliced+layers/unspliced"
    run(model_dir, path, "--out", out, "--device", "cpu", "--counts", both, "--format", "h5ad")
    run(model_dir, h5ad, "--out", tmp_path / "plain.h5ad", "--device", "cpu")
    found, plain = anndata.read_h5ad(out), anndata.read_h5ad(tmp_path / "plain.h5ad")
    np.testing.assert_array_equal(found.obsm[embed.KEY], plain.obsm[embed.KEY])
    assert found.uns["sclong"]["read"]["matrix"] == both
    run(model_dir, path, "--out", out, "--device", "cpu", "--counts", "round:layers/corrected")
    rounded = anndata.read_h5ad(out).uns["sclong"]["read"]["rounded"]
    assert 0 < rounded["share_rounded"] <= 1
    with pytest.raises(ValueError, match=r"parts\.h5ad: .*states loom, the content is h5ad"):
        run(model_dir, path, "--out", out, "--format", "loom")
    for option in (("--counts", "Y"), ("--min-genes", "0"), ("--id-type", "entrez")):
        with pytest.raises(SystemExit):
            run(model_dir, path, "--out", out, *option)


def test_a_corpus_takes_no_options_of_a_file(model_dir: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--min-genes: .* is a corpus, whose cells were chosen"):
        run(model_dir, corpus, "--out", tmp_path / "out.h5ad", "--min-genes", 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_refuses_a_gpu_that_is_not_there() -> None:
    assert opening.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA GPU"):
        opening.choose_device("cuda")


@pytest.mark.parametrize("option", [("--batch-size", "0"), ("--min-share-mapped", "1.5")])
def test_bad_options_are_usage_errors(option: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, tmp_path, "--out", tmp_path / "out.h5ad", *option)
    assert stopped.value.code == 2


@pytest.fixture(scope="module")
def mask_model(genes: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `model_dir`, as one that was trained with data.unmeasured=mask."""
    folder = tmp_path_factory.mktemp("mask")
    return write_model(folder, genes, seed=3, unmeasured="mask")


def test_genes_that_an_input_does_not_name_are_unknown_to_a_model_trained_so(
    mask_model: Path,
    h5ad: Path,
    counts: csr_matrix,
    genes: GeneVocabulary,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cells = anndata.read_h5ad(h5ad)
    named = np.zeros(len(genes), dtype=bool)
    named[::3] = True
    panel = cells[
        :, cells.var_names.isin([s for s, n in zip(genes.symbols, named, strict=True) if n])
    ]
    panel.write_h5ad(tmp_path / "panel.h5ad")
    with caplog.at_level(logging.WARNING):
        run(mask_model, tmp_path / "panel.h5ad", "--out", tmp_path / "out.h5ad", "--device", "cpu")
    assert "the others are read as unknown" in caplog.text
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert result.uns["sclong"]["transform"]["unmeasured"] == "mask"
    part = counts.copy()
    part.data[~named[part.indices]] = 0
    part.eliminate_zeros()
    model, n = load_model(mask_model), part.shape[0]
    measured = MeasuredGenes(named[None], np.zeros(n, dtype=int))
    expected = embed.embed_counts(model, part, measured=measured)
    np.testing.assert_allclose(result.obsm[embed.KEY], expected, rtol=1e-4, atol=1e-5)
    everything = MeasuredGenes(np.ones_like(named)[None], np.zeros(n, dtype=int))
    as_zeros = embed.embed_counts(model, part, measured=everything)
    assert np.abs(as_zeros - expected).max() > 0.01 * np.abs(expected).max()
    with pytest.raises(ValueError, match=r"trained with data\.unmeasured=mask: it needs to know"):
        embed.embed_counts(model, part)


def test_what_was_not_measured_stays_unknown_when_the_output_is_read_again(
    mask_model: Path, h5ad: Path, genes: GeneVocabulary, tmp_path: Path
) -> None:
    """The output has all genes of the model as columns, those of the panel among them."""
    cells = anndata.read_h5ad(h5ad)
    panel = cells[:, cells.var_names.isin(genes.symbols[::3])]
    panel.write_h5ad(tmp_path / "panel.h5ad")
    run(mask_model, tmp_path / "panel.h5ad", "--out", tmp_path / "one.h5ad", "--device", "cpu")
    once = anndata.read_h5ad(tmp_path / "one.h5ad")
    assert once.n_vars == len(genes)
    some = once[[4, 1, 7]].copy()
    some.write_h5ad(tmp_path / "some.h5ad")
    run(mask_model, tmp_path / "some.h5ad", "--out", tmp_path / "two.h5ad", "--device", "cpu")
    twice = anndata.read_h5ad(tmp_path / "two.h5ad")
    np.testing.assert_array_equal(twice.obsm[embed.KEY], once.obsm[embed.KEY][[4, 1, 7]])
    opened = input_cells.open_cells(tmp_path / "two.h5ad", genes=genes, min_genes=10)
    assert opened.measured is not None
    assert opened.measured.table.sum() == panel.n_vars


def test_cells_of_several_inputs_keep_what_each_of_them_measured(
    genes: GeneVocabulary, h5ad: Path, tmp_path: Path
) -> None:
    table = np.arange(len(genes)) % 3 != np.arange(2)[:, None]
    measured = MeasuredGenes(table, np.array([0, 1, 1, 0]))
    cells = anndata.read_h5ad(h5ad)[:4].copy()
    cells.uns[stored.UNS_KEY] = {"genes_hash": genes.hash} | stored.measured_record(measured)
    for name, values in stored.measured_column(measured).items():
        cells.obs[name] = values
    cells[[2, 0]].write_h5ad(tmp_path / "cells.h5ad")
    again = stored.measured_again(tmp_path / "cells.h5ad", cells[[2, 0]].obs, genes)
    assert again is not None
    np.testing.assert_array_equal(again.unmeasured(), ~table[[1, 0]])
    with pytest.raises(ValueError, match="obs/sclong_input must say which of 2 inputs"):
        stored.measured_again(tmp_path / "cells.h5ad", cells.obs.iloc[:, :0], genes)
    cells.uns[stored.UNS_KEY]["genes_hash"] = "other"
    cells.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(ValueError, match="another model's genes"):
        stored.measured_again(tmp_path / "other.h5ad", cells.obs, genes)


@pytest.mark.thorough
def test_a_corpus_says_which_genes_its_datasets_measure(
    mask_model: Path, corpus: Path, h5ad: Path, tmp_path: Path
) -> None:
    run(mask_model, h5ad, "--out", tmp_path / "file.h5ad", "--device", "cpu")
    run(mask_model, corpus, "--out", tmp_path / "all.h5ad", "--device", "cpu")
    source, everything = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("file", "all"))
    rows = source.obs_names.get_indexer(everything.obs["barcode"])
    np.testing.assert_allclose(
        everything.obsm[embed.KEY], source.obsm[embed.KEY][rows], rtol=1e-4, atol=1e-5
    )
    opened = input_cells.open_cells(corpus, genes=Corpus(corpus).genes)
    assert opened.measured is not None
    assert opened.measured.unmeasured().sum() == 0
