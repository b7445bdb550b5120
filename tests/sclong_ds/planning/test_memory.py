"""The predicted memory of a rank is near what a small run takes on a CPU."""

from __future__ import annotations

import pytest
from small_runs import make_corpus

from benchmarks.rank_memory import CASES, TINY, measure, predict

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("memory") / "corpus")


@pytest.fixture(scope="module", autouse=True)
def freed_at_once():
    """What is freed goes back to the system at once, as on a GPU it goes back to torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus):
    """Memory of a run without a model to speak of, bytes."""
    return measure(TINY, tmp_path_factory.mktemp("tiny") / "run", corpus, ranks=2)


@pytest.mark.parametrize("name", ["wide, zero3", "deep, zero2, recomputed"])
def test_predicted_peak_is_near_the_measured_one(name, base, corpus, tmp_path):
    measured = measure(CASES[name], tmp_path / "run", corpus, ranks=2) - base
    assert measured == pytest.approx(predict(CASES[name], ranks=2)["peak"], rel=0.2)
