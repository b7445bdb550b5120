"""Shared fixtures: the bundled cells as a finished corpus, the gene graph, and launching real
runs."""

from __future__ import annotations

import logging
import multiprocessing.process
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from goldens import REPORT
from launching import ROOT, run_module

BEGAN = time.monotonic()
LATE = pytest.StashKey[int]()
RESOURCES = ROOT / "data_prep" / "resources"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --golden-dir, --quick and --minutes."""
    parser.addoption("--golden-dir", metavar="DIR", help="goldens to test (default: tests/golden)")
    parser.addoption("--quick", action="store_true", help="skip a test when it starts a process")
    parser.addoption("--minutes", type=float, metavar="N", help="start no test after N minutes")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the tables of errors against the goldens, and how many tests there was no time for."""
    if config.stash[LATE]:
        minutes = config.getoption("--minutes")
        terminalreporter.section(f"not run, since {minutes:g} minutes were over")
        terminalreporter.write_line(f"number of tests: {config.stash[LATE]}")
    if config.stash[REPORT]:
        terminalreporter.section("agreement with the released code")
        for line in config.stash[REPORT]:
            terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    """Use one thread, and refuse somebody else's code: `kernels` is also a package on PyPI."""
    import torch
    from hypothesis import settings

    import kernels

    # An example's time depends on what else the machine does.
    settings.register_profile("tests", deadline=None)
    settings.load_profile("tests")

    # Small matrices gain nothing from threads, and lose much where other processes run.
    torch.set_num_threads(1)
    config.stash[REPORT], config.stash[LATE] = [], 0
    if config.getoption("--quick"):
        # A test that is left in its middle leaves its files to the garbage collector.
        config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnraisableExceptionWarning")

    assert Path(kernels.__file__).is_relative_to(ROOT), f"kernels is {kernels.__file__}, not ours"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """With --minutes, skip what would begin too late: a slow machine still tells of the rest."""
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - BEGAN > 60 * minutes:
        item.config.stash[LATE] += 1
        pytest.skip(f"{minutes:g} minutes are over (--minutes)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quick tests first, then those that launch ranks, then Slurm."""
    items.sort(
        key=lambda item: (
            bool(item.get_closest_marker("slurm")),
            bool(item.get_closest_marker("distributed")),
        )
    )


def start_no_process(self: object, *args: object, **options: object) -> None:
    """Skip the test that was about to start a process."""
    pytest.skip("starts a process (--quick)")


@pytest.fixture(autouse=True, scope="session")
def quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --quick, skip whatever starts a process, in the test or in what prepares it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--quick"):
            patch.setattr(subprocess.Popen, "__init__", start_no_process)
            patch.setattr(multiprocessing.process.BaseProcess, "start", start_no_process)
        yield


@pytest.fixture(autouse=True)
def root_logger_as_found() -> Iterator[None]:
    """A command called in the test's process may not leave its log handler, which writes to the
    captured stream of that test, to the tests that follow."""
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 430 bundled cells, converted and finalized; immune_c is the validation split."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus"
    manifest = RESOURCES / "demo" / "manifest.tsv"
    done = run_module("data_prep", "convert", manifest, "--out", corpus, check=False)
    assert done.returncode == 1, done.stderr  # the broken file is reported
    run_module("data_prep", "finalize", corpus, "--validation-datasets", "immune_c")
    return corpus


@pytest.fixture(scope="session")
def demo_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gene graph of the bundled Gene Ontology."""
    graph = tmp_path_factory.mktemp("graph") / "graph.npz"
    run_module("data_prep", "gene-graph", "--out", graph)
    return graph


SMALL_GENES = 300


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real cells over the 300 genes with most counts; 126 cells (immune_b) are the validation
    split."""
    import anndata
    import numpy as np

    from sclong_ds.corpus.genes import GeneVocabulary

    folder = tmp_path_factory.mktemp("small")
    cells = anndata.read_h5ad(RESOURCES / "demo" / "immune_a.h5ad")
    totals = dict(zip(cells.var_names, np.asarray(cells.X.sum(axis=0)).ravel(), strict=True))
    bundled = GeneVocabulary.bundled()
    by_count = sorted(range(len(bundled)), key=lambda i: -totals.get(bundled.symbols[i], 0))
    keep = sorted(by_count[:SMALL_GENES])
    columns = (bundled.ids, bundled.symbols, bundled.classes)
    genes = GeneVocabulary(*(tuple(column[i] for i in keep) for column in columns))
    genes.write(folder / "genes.tsv")
    rows = [
        f"{name}\t{RESOURCES / 'demo' / name}.{kind}"
        for name, kind in (("immune_a", "h5ad"), ("immune_b", "h5"))
    ]
    (folder / "manifest.tsv").write_text("\n".join(["dataset_id\tpath", *rows]) + "\n")
    corpus = folder / "corpus"
    run_module("data_prep", "convert", folder / "manifest.tsv", "--out", corpus,
               "--genes", folder / "genes.tsv", "--min-genes-mapped", 100,
               "--min-share-mapped", 0)  # fmt: skip
    run_module("data_prep", "finalize", corpus, "--validation-datasets", "immune_b")
    return corpus


@pytest.fixture(scope="session")
def small_graph(small_corpus: Path) -> Path:
    """The gene graph of the small corpus."""
    graph = small_corpus.parent / "graph.npz"
    run_module("data_prep", "gene-graph", "--genes", small_corpus / "genes.tsv", "--out", graph)
    return graph
