"""A dataset that takes too much, dies or cannot be written costs itself and no other."""

import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.convert import workers as workers_module
from data_prep.convert.convert import convert
from data_prep.ledger.ledger import read_ledger
from data_prep.manifest.manifest import Dataset
from data_prep.staging.dataset import Settings
from sclong_ds.corpus.genes import GeneVocabulary

GENES = GeneVocabulary.bundled()
SETTINGS = Settings(genes_hash=GENES.hash)


def datasets(folder: Path, names: str) -> list[Dataset]:
    """One small table per letter."""
    found = []
    for name in names:
        counts = np.random.default_rng(ord(name)).poisson(0.5, (20, 300))
        lines = [",".join(["cell", *GENES.symbols[:300]])]
        lines += [f"{name}{row}," + ",".join(map(str, counts[row])) for row in range(20)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
        found.append(Dataset(dataset_id=name, path=folder / f"{name}.csv"))
    return found


@pytest.fixture
def harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers stage some datasets in ways that harm."""
    (tmp_path / "harmful_worker.py").write_text(
        "import time\n"
        "import numpy as np\n"
        "from data_prep.convert import one_dataset, workers\n"
        "def work(pipe, corpus, settings, limits):\n"
        "    real = one_dataset.stage\n"
        "    def harmful(dataset, entry, *, folder, **options):\n"
        "        part = folder.with_name(f'.{folder.name}~')\n"
        "        if dataset.dataset_id in 'gst':\n"
        "            part.mkdir()\n"
        "        if dataset.dataset_id == 'g':\n"  # a grab
        "            np.ones(2**28)\n"
        "        if dataset.dataset_id == 's':\n"  # slow
        "            time.sleep(600)\n"
        "        if dataset.dataset_id == 't':\n"  # what the limit of data does not see
        "            workers.limit_memory(100)\n"
        "            held = []\n"
        "            while True:\n"
        "                held.append(np.ones(2**22))\n"
        "                time.sleep(0.01)\n"
        "        if dataset.dataset_id == 'w':\n"
        "            corpus.joinpath('ledger', 'w.json').mkdir()\n"
        "            one_dataset.write_entry = full\n"
        "        real(dataset, entry, folder=folder, **options)\n"
        "    def full(corpus, entry):\n"
        "        raise OSError(28, 'No space left on device', 'w.json')\n"
        "    one_dataset.stage = harmful\n"
        "    workers._work(pipe, corpus, settings, limits)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import harmful_worker

    monkeypatch.setattr(workers_module, "_work", harmful_worker.work)
    yield
    del sys.modules["harmful_worker"]


@pytest.mark.usefixtures("harm")
def test_what_takes_too_much_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    entries = convert(
        datasets(tmp_path, "agbstcw"),
        out=corpus,
        genes=GENES,
        settings=SETTINGS,
        max_memory_gib=0.75,
        max_minutes=0.4,
    )
    found = {entry["dataset_id"]: (entry["status"], entry["reason"]) for entry in entries}
    assert [found[name] for name in "abc"] == [("ok", "")] * 3
    assert [found[name][0] for name in "gstw"] == ["failed"] * 4
    assert found["g"][1].startswith("not enough memory (Unable to allocate 2.00 GiB")
    assert "GiB used, at most " in found["g"][1]
    assert found["s"][1].startswith("took more than 0.4 minutes; ")
    assert found["t"][1].startswith("took 0.")
    assert "0.8 GiB are allowed; if the file is sound, raise --max-memory" in found["t"][1]
    assert found["w"][1].startswith("[Errno 28] No space left on device")
    assert read_ledger(corpus) == sorted(entries, key=lambda entry: entry["dataset_id"])
    assert sorted(path.name for path in (corpus / "staging").iterdir()) == ["a", "b", "c"]
