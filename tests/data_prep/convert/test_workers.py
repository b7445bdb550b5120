"""A dataset that takes too much, dies or cannot be written costs itself and no other."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from staged_h5ad import GENES, SETTINGS, content, counts, run, write

from data_prep.convert import workers as workers_module
from data_prep.convert.convert import convert, prepare_corpus
from data_prep.genes.gene_names import resolver_of
from data_prep.ledger.ledger import read_ledger
from data_prep.manifest.manifest import Dataset


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
    options = {"out": corpus, "genes": GENES, "settings": SETTINGS}
    entries = convert(datasets(tmp_path, "agbtcw"), max_memory_gib=0.75, **options)
    # Alone: a limit that the others keep under any load would be a long wait.
    entries += convert(datasets(tmp_path, "s"), max_minutes=0.04, **options)
    found = {entry["dataset_id"]: (entry["status"], entry["reason"]) for entry in entries}
    assert [found[name] for name in "abc"] == [("ok", "")] * 3
    assert [found[name][0] for name in "gstw"] == ["failed"] * 4
    assert found["g"][1].startswith("not enough memory (Unable to allocate 2.00 GiB")
    assert "GiB used, at most " in found["g"][1]
    assert found["s"][1].startswith("took more than 0.04 minutes; ")
    assert re.match(r"took \d+\.\d GiB of memory, ", found["t"][1])
    assert "0.8 GiB are allowed; if the file is sound, raise --max-memory" in found["t"][1]
    assert found["w"][1].startswith("[Errno 28] No space left on device")
    assert read_ledger(corpus) == sorted(entries, key=lambda entry: entry["dataset_id"])
    assert sorted(path.name for path in (corpus / "staging").iterdir()) == ["a", "b", "c"]


def test_a_worker_that_dies_before_it_begins_leaves_what_is_staged(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    prepare_corpus(corpus, genes=GENES, settings=SETTINGS)
    dataset = write(tmp_path / "a.h5ad", counts())
    run(dataset, corpus, resolver_of(GENES))
    before = content(corpus)
    died = workers_module.write_failure(dataset, "killed", corpus, SETTINGS)
    assert (died["status"], content(corpus)) == ("failed", before)


def test_a_killed_worker_costs_its_dataset_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker does several datasets; the one at which it dies fails, those around it do not."""
    (tmp_path / "deadly_worker.py").write_text(
        "import os, signal\n"
        "from data_prep.convert import one_dataset, workers\n"
        "def work(pipe, corpus, settings, limits):\n"
        "    real = one_dataset.convert_dataset\n"
        "    def deadly(dataset, **options):\n"
        "        with (corpus / 'workers.txt').open('a') as file:\n"
        "            file.write(f'{dataset.dataset_id} {os.getpid()}\\n')\n"
        "        if dataset.dataset_id == 'b':\n"
        "            (corpus / 'staging' / '.b~').mkdir()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        if dataset.dataset_id == 'd':\n"
        "            raise SystemExit(3)\n"
        "        return real(dataset, **options)\n"
        "    one_dataset.convert_dataset = deadly\n"
        "    workers._work(pipe, corpus, settings, limits)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import deadly_worker

    monkeypatch.setattr(workers_module, "_work", deadly_worker.work)
    datasets = [write(tmp_path / f"{name}.h5ad", counts()) for name in "abcdef"]
    entries = convert(datasets, out=tmp_path / "c", genes=GENES, settings=SETTINGS)
    assert [entry["status"] for entry in entries] == ["ok", "failed", "ok", "failed", "ok", "ok"]
    assert "killed by signal 9" in entries[1]["reason"]
    assert "exit code 3" in entries[3]["reason"]
    assert sorted(os.listdir(tmp_path / "c" / "staging")) == ["a", "c", "e", "f"]
    assert read_ledger(tmp_path / "c") == entries
    lines = (tmp_path / "c" / "workers.txt").read_text().split()
    worker = dict(zip(lines[::2], lines[1::2], strict=True))
    assert worker["a"] == worker["b"] != worker["c"] == worker["d"] != worker["e"] == worker["f"]
    # The dead ones are tried again, by two workers that are replaced after every dataset.
    monkeypatch.undo()
    monkeypatch.setattr(workers_module, "DATASETS_PER_WORKER", 1)
    again = convert(datasets, out=tmp_path / "c", genes=GENES, settings=SETTINGS, jobs=2)
    assert [entry["status"] for entry in again] == ["ok"] * 6
    assert read_ledger(tmp_path / "c") == again
