"""Figures in README.md and docs/ that benchmarks have written, and where they stand.

    python docs/write_figures.py

`SENTENCES` names for a piece of text the result in benchmarks/results/NAME.json that its figures
come from. The script puts the figures of the results into the pages; a test fails where they
differ. A benchmark writes its result with `--json`, commit and machine included.
"""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Sentence(NamedTuple):
    """A piece of text with figures."""

    page: str
    result: str
    text: str
    """Fields are paths into `result`, with a format, for instance {n_cells:,}."""


SENTENCES = [
    Sentence("README.md", "dedup", "duplicate search over {n_cells:,} cells |"),
    Sentence("docs/measured.md", "dedup", "duplicate search over {n_cells:,} cells |"),
    Sentence(
        "docs/measured.md",
        "dedup",
        "MiB of memory at the peak: {peak_rss_mib:,.0f}, of scratch files: {scratch_mib:,.0f}",
    ),
]


class _Paths(string.Formatter):
    """Takes `a.b` as item b of item a."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        value: Any = kwargs
        for part in field_name.split("."):
            value = value[part]
        return value, field_name


def read_result(name: str) -> dict[str, Any]:
    """Return a written result: the whole document."""
    document = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def expected(sentence: Sentence) -> str:
    """Return the text with the figures of its result."""
    return _Paths().vformat(sentence.text, (), read_result(sentence.result)["result"])


def pattern(sentence: Sentence) -> re.Pattern[str]:
    """Return what finds the text in its page, whatever its figures are."""
    parts = string.Formatter().parse(sentence.text)
    return re.compile(
        "".join(
            re.escape(literal) + ("" if field is None else r"[\d.,]*\d")
            for literal, field, _, _ in parts
        )
    )


def main() -> int:
    """Put the figures into the pages; return the exit status."""
    status = 0
    for sentence in SENTENCES:
        page = ROOT / sentence.page
        text = page.read_text(encoding="utf-8")
        new, count = pattern(sentence).subn(expected(sentence), text)
        if count != 1:
            sys.stderr.write(f"error: {sentence.page} has {count} times: {sentence.text}\n")
            status = 1
        elif new != text:
            page.write_text(new, encoding="utf-8")
            sys.stdout.write(f"{sentence.page}: {expected(sentence)}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
