"""Figures in README.md and docs/ are those that the benchmarks have written."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("write_figures", ROOT / "docs" / "write_figures.py")
assert spec is not None
assert spec.loader is not None
write_figures = importlib.util.module_from_spec(spec)
sys.modules["write_figures"] = write_figures
spec.loader.exec_module(write_figures)


@pytest.mark.parametrize("sentence", write_figures.SENTENCES, ids=lambda s: s.text)
def test_text_and_result_agree(sentence: write_figures.Sentence) -> None:  # type: ignore[name-defined]
    text = (ROOT / sentence.page).read_text()
    found = [match.group() for match in write_figures.pattern(sentence).finditer(text)]
    assert found == [write_figures.expected(sentence)], "run: python docs/write_figures.py"


def test_every_benchmark_that_the_table_names_has_its_figures_in_a_sentence() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "measured.md").read_text()
    named = set(re.findall(r"python -m benchmarks\.(\w+)", text))
    assert len(named) >= 12
    without_figures = {"favor_compiled", "gpu_check"}
    assert named - {sentence.result for sentence in write_figures.SENTENCES} == without_figures


@pytest.mark.parametrize("name", sorted({s.result for s in write_figures.SENTENCES}))
def test_a_sentence_has_a_benchmark_that_writes_its_result(name: str) -> None:
    text = (ROOT / "benchmarks" / f"{name}.py").read_text()
    assert re.search(rf'write_result\(\s*args\.json, "{name}",', text)


@pytest.mark.parametrize("path", sorted(write_figures.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_a_result_names_its_benchmark_commit_and_machine(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["benchmark"] == path.stem
    assert (ROOT / "benchmarks" / f"{path.stem}.py").exists()
    assert re.fullmatch(r"[0-9a-f]{7,12}", document["commit"]), "run it on a committed state"
    assert document["device"]
    assert document["python"]
    assert any(sentence.result == path.stem for sentence in write_figures.SENTENCES)


def test_other_figures_are_found_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write_figures, "ROOT", tmp_path)
    monkeypatch.setattr(write_figures, "RESULTS", tmp_path)
    sentence = write_figures.Sentence("page.md", "one", "took {time.s:.1f} s for {n:,} cells")
    monkeypatch.setattr(write_figures, "SENTENCES", [sentence])
    (tmp_path / "one.json").write_text(
        '{"commit": "f74592f0aa01", "result": {"time": {"s": 2.04}, "n": 48024242, "e": 3.2e-7}}'
    )
    (tmp_path / "page.md").write_text("It took 17.5 s for 1,000 cells.\n")
    assert write_figures.main() == 0
    assert (tmp_path / "page.md").read_text() == "It took 2.0 s for 48,024,242 cells.\n"
    exact = write_figures.Sentence("page.md", "one", "{commit:.7}: {e:.0e} of {n/1e6:.1f} M")
    monkeypatch.setattr(write_figures, "SENTENCES", [exact])
    (tmp_path / "page.md").write_text("| 1b6dd8c: 1e-14 of 2 M.\n")
    assert write_figures.main() == 0
    assert (tmp_path / "page.md").read_text() == "| f74592f: 3e-7 of 48.0 M.\n"
    monkeypatch.setattr(write_figures, "SENTENCES", [sentence])
    capsys.readouterr()
    (tmp_path / "page.md").write_text("It takes long.\n")
    assert write_figures.main() == 1
    assert "page.md has 0 times" in capsys.readouterr().err
